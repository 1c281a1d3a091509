"""A KV cache that holds a prefix without a prefill: what a token costs does not depend on the numbers in it."""

import ctypes

import llama_cpp
import numpy as np

from attnmem_local.evaluate.scorer import Scorer

N_SEEN = 64  # tokens of the prefill whose keys and values are repeated


def fill(scorer: Scorer, n: int) -> None:
    """Put n tokens before the scorer's live text: a short prefill, repeated at positions 0 … n − 1.

    The scorer must have no prefix, room for n tokens before its live text, and flash attention. Raises RuntimeError if
    llama.cpp refuses the state.
    """
    llama = scorer.llama
    llama.eval(list(range(300, 300 + N_SEEN)))
    buffer = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(llama.ctx, 0))()
    llama_cpp.llama_state_seq_get_data(llama.ctx, buffer, len(buffer), 0)
    state = repeated(np.frombuffer(buffer, np.uint8), n)
    if not llama_cpp.llama_state_seq_set_data(llama.ctx, state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), len(state), 0):
        raise RuntimeError(f"llama.cpp refused a state of {n} tokens")
    scorer.n_prefix = n


def repeated(state: np.ndarray, n: int) -> np.ndarray:
    """The state of a sequence of N_SEEN tokens as one of n tokens; the layout is that of llama_kv_cache::state_write."""
    parts, position = [], 0

    def take(size: int) -> np.ndarray:
        nonlocal position
        position += size
        return state[position - size : position]

    parts += [take(12), np.array([n], np.uint32).view(np.uint8)]  # magic, sequence, streams; cells
    take(4)
    cells = np.zeros((n, 3), np.int32)  # position, number of sequences, sequence
    cells[:, 0], cells[:, 1] = np.arange(n), 1
    parts.append(cells.view(np.uint8).reshape(-1))
    take(12 * N_SEEN)
    parts.append(head := take(8))
    v_trans, n_layer = head.view(np.uint32)
    assert not v_trans, "without flash attention values are transposed"
    for _ in range(2 * n_layer):  # keys of all layers, then values
        parts.append(head := take(12))  # type, size of a row
        row = int(head[4:].view(np.uint64)[0])
        parts.append(np.resize(take(N_SEEN * row), n * row))
    assert position == len(state), "the layout of llama_kv_cache::state_write has changed"
    return np.concatenate(parts)
