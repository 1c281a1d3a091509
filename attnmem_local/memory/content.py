"""Reading the bytes of a memory file, for the Python parser and the native loader alike."""

import mmap
import os
import stat
from pathlib import Path

import numpy as np

from .errors import Unreadable

ALIGNMENT = 64  # bytes, a cache line: the native loader uses the tables in place


def read_content(path: str | os.PathLike, mapped: bool = False) -> np.ndarray:
    """The content of a file: uint8 [n], read-only, aligned to ALIGNMENT.

    mapped: map the file instead of reading it, which saves time and RAM. If another program then overwrites the file in
    place, as cp does, the returned bytes change; if it truncates the file, access to them kills the process.
    Raises Unreadable if the file cannot be opened, is not a regular file, or does not fit into RAM.
    """
    path = Path(path)
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as f:  # or a FIFO would block here
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable(f"'{path}' is not a regular file; name a memory file")
            if mapped and status.st_size:
                return np.frombuffer(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            content = _empty(status.st_size)
            content = content[: f.readinto(content.data)]
    except MemoryError:
        raise Unreadable(f"'{path}' does not fit into RAM") from None
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL
        if isinstance(error, Unreadable):
            raise
        raise Unreadable(f"cannot open '{path}': {getattr(error, 'strerror', None) or error}") from None
    content.flags.writeable = False
    return content


def _empty(n: int) -> np.ndarray:
    """uint8 [n], aligned to ALIGNMENT; numpy itself guarantees 16 bytes only."""
    padded = np.empty(n + ALIGNMENT, np.uint8)
    return padded[-padded.ctypes.data % ALIGNMENT :][:n]


def aligned(data: memoryview) -> np.ndarray:
    """A copy of the bytes: uint8 [n], writable, aligned to ALIGNMENT."""
    content = _empty(len(data))
    content[:] = data
    return content
