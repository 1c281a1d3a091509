"""A GGUF file as parts that can each be wrong, to write files that gguf.GGUFWriter cannot write."""

import math
import struct
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}
TENSOR_F32, TENSOR_F16, TENSOR_Q8_0, TENSOR_I32 = 0, 1, 8, 26
_BLOCKS = {TENSOR_F32: (1, 4), TENSOR_F16: (1, 2), TENSOR_Q8_0: (32, 34), TENSOR_I32: (1, 4)}  # values and bytes of a block


@dataclass
class Value:
    type: int
    payload: bytes  # the bytes after the type in the file


@dataclass
class Tensor:
    name: bytes
    dims: list[int]  # in file order, which begins with the width of a row
    type: int
    data: bytes
    offset: int | None = None  # None for the position after the previous tensor

    def sized(self) -> "Tensor":
        """The tensor with its data cut or padded with zeros to the size of its dimensions, 1 M values at most."""
        values, size = _BLOCKS.get(self.type, (1, 4))
        n = min(math.prod(max(d, 0) for d in self.dims), 1 << 20) // values * size
        return Tensor(self.name, self.dims, self.type, self.data[:n].ljust(n, b"\0"), self.offset)


@dataclass
class Container:
    keys: list[tuple[bytes, Value]]
    tensors: list[Tensor]
    version: int = 3
    alignment: int = 64  # of the tensors as written; the key may say otherwise
    counts: dict[str, int] = field(default_factory=dict)  # false numbers of "keys" and "tensors" to write

    def bytes(self) -> bytes:
        counts = {"tensors": len(self.tensors), "keys": len(self.keys)} | self.counts
        head = [struct.pack("<4sIQQ", b"GGUF", self.version, counts["tensors"], counts["keys"])]
        for key, value in self.keys:
            head += [text(key), struct.pack("<I", value.type), value.payload]
        data = bytearray()
        for t in self.tensors:
            offset = len(data) if t.offset is None else t.offset
            dims = struct.pack(f"<I{len(t.dims)}Q", len(t.dims), *(d % (1 << 64) for d in t.dims))
            head += [text(t.name), dims, struct.pack("<IQ", t.type, offset % (1 << 64))]
            data += t.data + bytes(-len(t.data) % self.alignment)
        content = b"".join(head)
        return content + bytes(-len(content) % self.alignment) + bytes(data)


def text(data: bytes, n: int | None = None) -> bytes:
    """A string as in the file; n: a false length to write."""
    return struct.pack("<Q", len(data) if n is None else n) + data


def scalar(type: int, value) -> Value:
    return Value(type, struct.pack("<" + _CODES[type], value))


def string(data: bytes) -> Value:
    return Value(STRING, text(data))


def array(item_type: int, items: bytes, n: int) -> Value:
    return Value(ARRAY, struct.pack("<IQ", item_type, n) + items)


def parse(content: bytes) -> Container:
    """The parts of a valid file."""
    position = 4

    def take(code: str):
        nonlocal position
        (value,) = struct.unpack_from("<" + code, content, position)
        position += struct.calcsize("<" + code)
        return value

    def take_text() -> bytes:
        nonlocal position
        n = take("Q")
        position += n
        return content[position - n : position]

    def take_value() -> Value:
        nonlocal position
        kind, begin = take("I"), position
        if kind == STRING:
            take_text()
        elif kind == ARRAY:
            item, n = take("I"), take("Q")
            position += n * struct.calcsize(_CODES[item])
        else:
            take(_CODES[kind])
        return Value(kind, content[begin:position])

    version, n_tensors, n_keys = take("I"), take("Q"), take("Q")
    keys = [(take_text(), take_value()) for _ in range(n_keys)]
    infos = [(take_text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(n_tensors)]
    position += -position % 64
    tensors = [Tensor(name, dims, kind, content[position + offset :]).sized() for name, dims, kind, offset in infos]
    return Container(keys, tensors, version)
