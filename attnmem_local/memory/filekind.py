"""What a file claims to be, by the first keys of its header: enough to tell a user which of two files is the wrong one."""

import os
import struct

from .format import ADAPTER_TYPE

_HEAD = 1 << 16  # bytes that are looked at; writers put the general keys first
_STRING, _ARRAY = 8, 9
_SIZE = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the scalars of GGUF


def file_kind(path: str | os.PathLike) -> str:
    """ "memory", "model", "adapter" of another kind, "other" if the file is not GGUF, or "unknown". Raises OSError."""
    with open(path, "rb") as f:
        head = f.read(_HEAD)
    if head[:4] != b"GGUF":
        return "other"
    keys = dict(_strings(head))
    if keys.get("general.type") == "adapter":
        return "memory" if keys.get("adapter.type") == ADAPTER_TYPE else "adapter"
    return "model" if "general.architecture" in keys else "unknown"


def _strings(head: bytes):
    """Keys and values of the strings before the first array."""
    at = 24  # magic, version, number of tensors, number of keys

    def string() -> str:
        nonlocal at
        (n,) = struct.unpack_from("<Q", head, at)
        at += 8 + n
        return head[at - n : at].decode(errors="replace")

    try:
        while True:
            key = string()
            (kind,) = struct.unpack_from("<I", head, at)
            at += 4
            if kind == _STRING:
                yield key, string()
            elif kind in _SIZE:
                at += _SIZE[kind]
            else:
                return
    except struct.error:  # the end of what was read
        return
