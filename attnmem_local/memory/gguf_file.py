"""The keys and tensors of an untrusted GGUF file.

Nothing is read beyond the end of the file, and arrays of numbers are viewed, not walked, so the cost of a file is bounded by its
size. The native loader reads the same files by the same rules, in the same order.
"""

import math
import struct
from typing import NamedTuple

import numpy as np

from .errors import Invalid, NotAMemory, Truncated

VERSION = 3
ALIGNMENT = 64  # bytes, a cache line: tensors begin at multiples of it
MAX_KEYS = 1 << 16
MAX_NAME = 64  # bytes of a tensor name, including the terminating NUL that ggml adds
MAX_DIMS = 4

_SCALARS = {
    0: ("u8", "B"), 1: ("i8", "b"), 2: ("u16", "H"), 3: ("i16", "h"), 4: ("u32", "I"), 5: ("i32", "i"), 6: ("f32", "f"),
    7: ("bool", "?"), 10: ("u64", "Q"), 11: ("i64", "q"), 12: ("f64", "d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_TENSORS: dict[int, tuple[str, np.dtype, int, int]] = {  # type id -> name, element dtype, values per block, bytes per block
    0: ("f32", np.dtype("<f4"), 1, 4),
    1: ("f16", np.dtype("<f2"), 1, 2),
    8: ("q8_0", np.dtype("u1"), 32, 34),
    26: ("i32", np.dtype("<i4"), 1, 4),
}


class Value(NamedTuple):
    type: str  # named as in gguf.h, for example "str" or "arr[i32]"
    value: str | int | float | np.ndarray | None  # None for arrays of strings, which memory files do not use


class Tensor(NamedTuple):
    type: str
    shape: tuple[int, ...]  # always 4 dimensions, in numpy order
    data: np.ndarray  # [n_rows, width], a view of the file; Q8_0 rows are uint8


class GGUFFile:
    """A GGUF file, read in file order: read_keys first, then read_tensors. Raises NotAMemory if it is no GGUF."""

    def __init__(self, content: np.ndarray | bytes):
        self._content = memoryview(content)  # type: ignore[arg-type]
        if self._content[:4] != b"GGUF":
            raise NotAMemory("this is not a GGUF file")
        self._position = 4
        self._n_tensors = 0
        self._expected_offset = 0
        self.keys: dict[str, Value] = {}

    def read_keys(self) -> None:
        """Fill `keys`. Raises Truncated or Invalid; `keys` then has those before the first that is damaged."""
        if (version := self._number("I")) != VERSION:
            raise Invalid(f"the file has GGUF version {version}, expected {VERSION}")
        self._n_tensors = self._number("Q")
        if (n_keys := self._number("Q")) > MAX_KEYS:
            raise Invalid(f"the file has {n_keys} keys, expected at most {MAX_KEYS}")
        for _ in range(n_keys):
            key = self._text("a key")
            if not key or key in self.keys:
                raise Invalid(f"the key '{key}' is empty or duplicated")
            self.keys[key] = self._value(key)

    def read_tensors(self, limit: int) -> dict[str, Tensor]:
        """The tensors by name, at most `limit`, packed without gaps but for ALIGNMENT. Raises Truncated or Invalid."""
        if self._n_tensors > limit:
            raise Invalid(f"the file has {self._n_tensors} tensors, expected at most {limit}")
        infos = {}
        for _ in range(self._n_tensors):
            name = self._text("a tensor name")
            if len(name.encode()) >= MAX_NAME or name in infos:
                raise Invalid(f"the tensor '{name}' is duplicated, or its name is longer than {MAX_NAME - 1} bytes")
            n_dims = self._number("I")
            if n_dims > MAX_DIMS:
                raise Invalid(f"the tensor '{name}' has {n_dims} dimensions, expected at most {MAX_DIMS}")
            dims = [self._number("Q") for _ in range(n_dims)] + [1] * (MAX_DIMS - n_dims)
            infos[name] = dims, self._number("I"), self._number("Q")
        begin = self._position + -self._position % ALIGNMENT
        return {name: self._tensor(name, begin, *info) for name, info in infos.items()}

    def _tensor(self, name: str, begin: int, dims: list[int], type: int, offset: int) -> Tensor:
        if type not in _TENSORS:
            raise Invalid(f"the tensor '{name}' has type {type}, expected one of {', '.join(map(str, _TENSORS))}")
        type_name, dtype, block, block_bytes = _TENSORS[type]
        if 0 in dims or dims[0] % block:
            raise Invalid(f"the tensor '{name}' has shape {dims}, expected no 0 and rows of a multiple of {block} values")
        if offset != self._expected_offset:
            raise Invalid(f"the tensor '{name}' has offset {offset}, expected {self._expected_offset}")
        row_bytes = dims[0] // block * block_bytes
        nbytes = row_bytes * math.prod(dims[1:])
        file_bytes = len(self._content)
        if nbytes > file_bytes - begin - offset:
            raise Truncated(
                f"the tensor '{name}' ends beyond the end of the file, which has {file_bytes} bytes; build or copy the memory again"
            )
        self._expected_offset += nbytes + -nbytes % ALIGNMENT
        data = np.frombuffer(self._content, dtype, nbytes // dtype.itemsize, begin + offset)
        return Tensor(type_name, tuple(reversed(dims)), data.reshape(-1, row_bytes // dtype.itemsize))

    def _value(self, key: str) -> Value:
        type = self._number("I")
        if type == _STRING:
            return Value("str", self._text(f"the key '{key}'"))
        if type in _SCALARS:
            name, code = _SCALARS[type]
            return Value(name, self._number(code))
        if type != _ARRAY:
            raise Invalid(f"the key '{key}' has the unknown type {type}")
        item, n = self._number("I"), self._number("Q")
        if item == _STRING:
            self._skip_texts(n)
            return Value("arr[str]", None)
        if item not in _SCALARS:
            raise Invalid(f"the key '{key}' is an array of the unknown type {item}")
        name, code = _SCALARS[item]
        begin = self._take(n * struct.calcsize(code))
        return Value(f"arr[{name}]", np.frombuffer(self._content, "<" + code, n, begin) if n else np.zeros(0, "<" + code))

    def _skip_texts(self, n: int) -> None:
        end, unpack = self._position, struct.Struct("<Q").unpack_from
        try:
            for _ in range(n):
                end += 8 + unpack(self._content, end)[0]
        except (struct.error, OverflowError):  # beyond the end of the file, which _take reports
            end = len(self._content) + 1
        self._take(end - self._position)

    def _text(self, subject: str) -> str:
        """A string; subject: its name in an error."""
        n = self._number("Q")
        begin = self._take(n)
        try:
            text = str(self._content[begin : begin + n], "utf-8")
        except UnicodeDecodeError:
            raise Invalid(f"{subject} is not UTF-8") from None
        if "\0" in text:
            raise Invalid(f"{subject} contains a NUL")
        return text

    def _number(self, code: str):
        (number,) = struct.unpack_from("<" + code, self._content, self._take(struct.calcsize("<" + code)))
        return number

    def _take(self, n: int) -> int:
        """Step over the next n bytes; returns where they begin."""
        if n > len(self._content) - self._position:
            raise Truncated("the header is incomplete or damaged; build or copy the memory again")
        self._position += n
        return self._position - n
