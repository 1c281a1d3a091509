"""The bytes of a memory file, as both readers take them."""

import mmap
import os
import stat
from pathlib import Path

import numpy as np

from .errors import Unreadable

ALIGNMENT = 64  # bytes: the native reader uses tables in place, and a row of 64 float16 values is two cache lines


def read_content(path: str | os.PathLike, mapped: bool = False) -> np.ndarray:
    """The content of a file: uint8 [n], read-only, beginning at a multiple of ALIGNMENT.

    mapped: map the file instead of reading it. That saves the time and the RAM, but then a program that truncates or
    overwrites the file in place, as cp does, changes what is used, or ends the process.
    Raises Unreadable if it cannot be opened or is not a regular file.
    """
    path = Path(path)
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:  # a FIFO must not block
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable(f"'{path}' is not a regular file")
            if mapped and status.st_size:
                return np.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            content = _empty(status.st_size)
            content = content[: f.readinto(content.data)]
    except MemoryError:
        raise Unreadable(f"'{path}' does not fit into RAM") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"cannot open '{path}': {getattr(error, 'strerror', None) or error}") from None
    content.flags.writeable = False
    return content


def _empty(n: int) -> np.ndarray:
    """uint8 [n], beginning at a multiple of ALIGNMENT; numpy itself aligns to 16."""
    room = np.empty(n + ALIGNMENT, np.uint8)
    return room[-room.ctypes.data % ALIGNMENT :][:n]


def aligned(data: memoryview) -> np.ndarray:
    """A copy of some bytes that begins at a multiple of ALIGNMENT: uint8 [n], writable."""
    content = _empty(len(data))
    content[:] = data
    return content
