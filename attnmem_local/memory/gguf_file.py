"""The keys and tensors of a GGUF file that is not trusted.

Nothing is read beyond the end of the file, and no array is walked element by element: what a file costs is bounded by
its size. llama-adapter-mem.cpp reads the same files by the same rules, in the same order.
"""

import math
import struct
from typing import NamedTuple

import numpy as np

from .errors import Invalid, NotAMemory, Truncated

VERSION = 3
ALIGNMENT = 64  # of tensors: a cache line
MAX_KEYS = 1 << 16
MAX_NAME = 64  # bytes, with a closing NUL
MAX_DIMS = 4

_SCALARS = {
    0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"), 5: ("i32", "i"), 6: ("f32", "f"),
    7: ("bool", "?"), 10: ("u64", "Q"), 11: ("i64", "q"), 12: ("f64", "d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_TENSORS: dict[int, tuple[str, np.dtype, int, int]] = {  # name, numbers in the file, values and bytes of a block
    0: ("f32", np.dtype("<f4"), 1, 4),
    1: ("f16", np.dtype("<f2"), 1, 2),
    8: ("q8_0", np.dtype("u1"), 32, 34),
    26: ("i32", np.dtype("<i4"), 1, 4),
}


class Value(NamedTuple):
    type: str  # as in gguf.h, "str" or "arr[i32]", say
    value: str | int | float | np.ndarray | None  # None for an array of strings: no memory has one


class Tensor(NamedTuple):
    type: str
    shape: tuple[int, ...]  # of 4 dimensions, in numpy order
    data: np.ndarray  # [rows, width], a view of the file; rows of Q8_0 as bytes


class GGUFFile:
    """Reads the keys; the tensors follow with read_tensors. Raises Truncated, Invalid or NotAMemory."""

    def __init__(self, content: np.ndarray):
        self._content = memoryview(content)  # type: ignore[arg-type]
        self._at = 4
        if self._content[:4] != b"GGUF":
            raise NotAMemory("this is not a GGUF file")
        if (version := self._number("I")) != VERSION:
            raise Invalid(f"the file has GGUF version {version}, expected {VERSION}")
        self._n_tensors = self._number("Q")
        self.keys: dict[str, Value] = {}
        if (n_keys := self._number("Q")) > MAX_KEYS:
            raise Invalid(f"the file has {n_keys} keys, expected at most {MAX_KEYS}")
        for _ in range(n_keys):
            key = self._text("a key")
            if not key or key in self.keys:
                raise Invalid(f"the key '{key}' is empty or there twice")
            self.keys[key] = self._value(key)

    def read_tensors(self, limit: int) -> dict[str, Tensor]:
        """The tensors, which have no padding but that of ALIGNMENT. limit: how many there may be."""
        if self._n_tensors > limit:
            raise Invalid(f"the file has {self._n_tensors} tensors, expected at most {limit}")
        infos = {}
        for _ in range(self._n_tensors):
            name = self._text("a tensor name")
            if len(name.encode()) >= MAX_NAME or name in infos:
                raise Invalid(f"the tensor '{name}' is there twice, or its name is too long")
            n_dims = self._number("I")
            if n_dims > MAX_DIMS:
                raise Invalid(f"the tensor '{name}' has {n_dims} dimensions")
            dims = [self._number("Q") for _ in range(n_dims)] + [1] * (MAX_DIMS - n_dims)
            infos[name] = dims, self._number("I"), self._number("Q")
        begin = self._at + -self._at % ALIGNMENT
        return {name: self._tensor(name, begin, *info) for name, info in infos.items()}

    _expected_offset = 0

    def _tensor(self, name: str, begin: int, dims: list[int], type: int, offset: int) -> Tensor:
        if type not in _TENSORS:
            raise Invalid(f"the tensor '{name}' has type {type}")
        type_name, dtype, block, size = _TENSORS[type]
        if 0 in dims or dims[0] % block:
            raise Invalid(f"the tensor '{name}' has shape {dims}")
        if offset != self._expected_offset:
            raise Invalid(f"the tensor '{name}' has offset {offset}, expected {self._expected_offset}")
        row = dims[0] // block * size  # bytes
        nbytes = row * math.prod(dims[1:])
        if nbytes > len(self._content) - begin - offset:
            size = len(self._content)
            raise Truncated(f"the tensor '{name}' ends behind the file, which has {size} bytes; build or copy the memory again")
        self._expected_offset += nbytes + -nbytes % ALIGNMENT
        data = np.frombuffer(self._content, dtype, nbytes // dtype.itemsize, begin + offset)
        return Tensor(type_name, tuple(reversed(dims)), data.reshape(-1, row // dtype.itemsize))

    def _value(self, key: str) -> Value:
        type = self._number("I")
        if type == _STRING:
            return Value("str", self._text(f"the key '{key}'"))
        if type in _SCALARS:
            name, code = _SCALARS[type]
            return Value(name, self._number(code))
        if type != _ARRAY:
            raise Invalid(f"the key '{key}' has type {type}")
        item, n = self._number("I"), self._number("Q")
        if item == _STRING:
            self._skip_texts(n)
            return Value("arr[str]", None)
        if item not in _SCALARS:
            raise Invalid(f"the key '{key}' is an array of type {item}")
        name, code = _SCALARS[item]
        begin = self._take(n * struct.calcsize(code))
        return Value(f"arr[{name}]", np.frombuffer(self._content, "<" + code, n, begin) if n else np.zeros(0, "<" + code))

    def _skip_texts(self, n: int) -> None:
        at, unpack = self._at, struct.Struct("<Q").unpack_from
        try:
            for _ in range(n):
                at += 8 + unpack(self._content, at)[0]
        except struct.error:  # beyond the end
            at = len(self._content) + 1
        self._take(at - self._at)

    def _text(self, what: str) -> str:
        n = self._number("Q")
        begin = self._take(n)
        try:
            text = str(self._content[begin : begin + n], "utf-8")
        except UnicodeDecodeError:
            raise Invalid(f"{what} is not UTF-8") from None
        if "\0" in text:
            raise Invalid(f"{what} has a NUL")
        return text

    def _number(self, code: str):
        (number,) = struct.unpack_from("<" + code, self._content, self._take(struct.calcsize("<" + code)))
        return number

    def _take(self, n: int) -> int:
        """Where the next n bytes begin."""
        if n > len(self._content) - self._at:
            raise Truncated("the header is incomplete or damaged; build or copy the memory again")
        self._at += n
        return self._at - n
