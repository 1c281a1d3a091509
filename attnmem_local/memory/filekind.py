"""Telling memories, models and other adapters apart by the head of their files, so that an error can name the mix-up."""

import contextlib
import os

from .errors import MemoryRefused, NotAMemory
from .format import ADAPTER_TYPE
from .gguf_file import GGUFFile, Value

_HEAD_BYTES = 1 << 16  # writers put the general keys first, long before this


def file_kind(path: str | os.PathLike) -> str:
    """ "memory", "model", "adapter" of another type, "other" if the file is not GGUF, or "unknown". Raises OSError."""
    with open(path, "rb") as f:
        head = f.read(_HEAD_BYTES)
    try:
        file = GGUFFile(head)
    except NotAMemory:
        return "other"
    with contextlib.suppress(MemoryRefused):  # the head of a model ends within its vocabulary; damage is for the reader to report
        file.read_keys()
    if file.keys.get("general.type") == Value("str", "adapter"):
        return "memory" if file.keys.get("adapter.type") == Value("str", ADAPTER_TYPE) else "adapter"
    return "model" if "general.architecture" in file.keys else "unknown"
