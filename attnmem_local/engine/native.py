"""ctypes of the memory adapter API of the patched llama.cpp (include/llama.h, src/llama-ext.h), nothing else."""

import ctypes
import operator
from ctypes import POINTER, byref, c_char_p, c_float, c_int32, c_int64, c_size_t, c_uint64, c_void_p

import llama_cpp.llama_cpp as _llama_cpp
import numpy as np

from ..memory.errors import Invalid, refusal

_ERROR_SIZE = 1024
_lib = _llama_cpp._lib

#: enum llama_mem_lookup
LOOKUPS = {"auto": 0, "stock": 1, "scan": 2, "hnsw": 3, "lists": 4}

_SIGNATURES = {
    "llama_adapter_mem_init": (c_void_p, [c_void_p, c_void_p, c_size_t, c_char_p, c_size_t]),
    "llama_adapter_mem_free": (None, [c_void_p]),
    "llama_adapter_mem_meta_val_str": (c_int32, [c_void_p, c_char_p, c_char_p, c_size_t]),
    "llama_adapter_mem_n_prefix_tokens": (c_uint64, [c_void_p]),
    "llama_adapter_mem_prefix_tokens": (POINTER(c_int32), [c_void_p]),
    "llama_adapter_mem_set_rows": (c_int32, [c_void_p, c_char_p, c_int64, c_int64, c_void_p, c_size_t, c_char_p, c_size_t]),
    "llama_adapter_mem_state": (
        c_int32,
        [c_void_p, c_int32, c_int32, POINTER(c_float), c_int32, POINTER(c_float), POINTER(c_int64)],
    ),
    "llama_set_adapters_mem": (
        c_int32,
        [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float), c_int32, c_char_p, c_size_t],
    ),
}

for _name, (_restype, _argtypes) in _SIGNATURES.items():
    try:
        _function = getattr(_lib, _name)
    except AttributeError:
        raise ImportError(
            "this llama-cpp-python has no attention-state memory; run ./build.sh to build and install the patched one"
        ) from None
    _function.restype, _function.argtypes = _restype, _argtypes


def init(model, content: np.ndarray) -> int:
    """Load a memory for a model (a llama_model_p) from the content of its file, see read_content.

    The tables are used in place: the caller keeps the content until the memory is freed, with free() or with the model.
    set_rows writes to the content of layers on the CPU, which must then be writable memory.
    Returns its handle. Raises MemoryRefused.
    """
    error = ctypes.create_string_buffer(_ERROR_SIZE)
    handle = _lib.llama_adapter_mem_init(model, content.ctypes.data, content.nbytes, error, _ERROR_SIZE)
    if not handle:
        raise refusal(error.value.decode(errors="replace"))
    return handle


def free(handle: int) -> None:
    _lib.llama_adapter_mem_free(handle)


def metadata(handle: int, key: str) -> str | None:
    """A scalar metadata value as text, or None if the memory has no such key."""
    size = _lib.llama_adapter_mem_meta_val_str(handle, key.encode(), None, 0)
    if size < 0:
        return None
    buffer = ctypes.create_string_buffer(size + 1)
    _lib.llama_adapter_mem_meta_val_str(handle, key.encode(), buffer, size + 1)
    return buffer.value.decode(errors="replace")


def prefix_tokens(handle: int) -> list[int]:
    return _lib.llama_adapter_mem_prefix_tokens(handle)[: _lib.llama_adapter_mem_n_prefix_tokens(handle)]


def set_memories(context, handles: list[int], gains: list[float], lookup: str) -> None:
    """Attach exactly these memories to a context (a llama_context_p). Raises MemoryRefused, changing nothing."""
    error = ctypes.create_string_buffer(_ERROR_SIZE)
    n = len(handles)
    if _lib.llama_set_adapters_mem(
        context, (c_void_p * n)(*handles), n, (c_float * n)(*gains), LOOKUPS[lookup], error, _ERROR_SIZE
    ):
        raise refusal(error.value.decode(errors="replace"))


def set_rows(handle: int, name: str, first: int, rows: np.ndarray) -> None:
    """Overwrite rows of a table in place, in every context that uses the memory; no graph is built again.

    name: a tensor "key", "value", "bias" or "lse" of the file, such as "seg.0.blk.3.anchor.key", without search graph or lists.
    rows: [n, row] as the file has them: float16, float32 or uint8 (the bytes of Q8_0); float32 [n] for "bias" and "lse".
    The content that was given to init must be writable. Live tokens keep the keys and values of the old rows.
    Raises MemoryRefused, changing nothing.
    """
    rows = np.ascontiguousarray(rows)
    types = ("float32",) if name.endswith((".bias", ".lse")) else ("float16", "float32", "uint8")
    if rows.dtype not in types:
        raise Invalid(f"rows of '{name}' have type {rows.dtype}, expected {' or '.join(types)}")
    if abs(first := operator.index(first)) >= 2**63:
        raise Invalid(f"'{name}' has no row {first}")
    error = ctypes.create_string_buffer(_ERROR_SIZE)
    if _lib.llama_adapter_mem_set_rows(handle, name.encode(), first, len(rows), rows.ctypes.data, rows.nbytes, error, _ERROR_SIZE):
        raise refusal(error.value.decode(errors="replace"))


def state(handle: int, layer: int, q: np.ndarray, lookup: str) -> np.ndarray:
    """States of a memory for queries of one layer: the first result of search()."""
    return search(handle, layer, q, lookup)[0]


def search(handle: int, layer: int, q: np.ndarray, lookup: str) -> tuple[np.ndarray, int]:
    """States of a memory for queries of one layer, and the work of finding them.

    q: float32 [n_tokens, n_head, d_k], after RoPE, in GGUF order.
    Returns the states, float32 [n_tokens, n_head, d_v + 1] with the log-sum-exp last, and the number of entries and lists
    that lookups scored for all tokens and heads; anchors, which are attended, do not count.
    Raises ValueError for another shape, or a layer without tables on the CPU.
    """
    n_head, d_k, d_v = (
        int(metadata(handle, f"attnmem.attention.{key}") or 0) for key in ("head_count", "key_length", "value_length")
    )
    if q.ndim != 3 or q.shape[1:] != (n_head, d_k):
        raise ValueError(f"queries have shape {q.shape}, expected [n_tokens, {n_head}, {d_k}]")
    q = np.ascontiguousarray(q, dtype=np.float32)
    out = np.empty((*q.shape[:2], d_v + 1), dtype=np.float32)
    n_scored = c_int64()
    pointer = POINTER(c_float)
    if _lib.llama_adapter_mem_state(
        handle, layer, q.shape[0], q.ctypes.data_as(pointer), LOOKUPS[lookup], out.ctypes.data_as(pointer), byref(n_scored)
    ):
        raise ValueError(f"layer {layer} has no tables on the CPU")
    return out, n_scored.value
