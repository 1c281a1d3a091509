"""HNSW and lists against exact search, on live queries of real text that the tables were not built from."""

import numpy as np
import pytest

from attnmem_local.builder.capture import capture, prefill
from attnmem_local.engine import native
from attnmem_local.evaluate.fidelity import fidelity
from attnmem_local.runtime.llama import MemoryLlama

pytestmark = pytest.mark.slow  # they build a memory of 1,024 real tokens


def live_queries(model, prefix_tokens, window):
    """The queries of a window, one array per layer: float32 [n_tokens, n_head, d_k] in GGUF order."""
    targets = capture(model, prefill(model, prefix_tokens), [window])
    queries = (model.to_gguf_order(t.q).unflatten(1, (-1, len(window))) for t in targets)  # [n_head_kv, g, n_tokens, d_k]
    return [q.permute(2, 0, 1, 3).flatten(1, 2).numpy() for q in queries]


@pytest.mark.parametrize("search", ["hnsw", "lists"])
def test_recall(real, default_build_model, default_model, search):
    path, memory, (window, _) = real
    llama = MemoryLlama(str(default_model), memory=path, verbose=False)
    handle = llama.memories[0].memory.handle
    agrees = []
    for layer, q in enumerate(live_queries(default_build_model, memory.prefix_tokens, window)):
        scan, searched = (native.state(handle, layer, q, lookup) for lookup in ("scan", search))
        agrees.append((scan == searched).all(-1))
        one_by_one = [native.state(handle, layer, q[i : i + 1], search)[0] for i in range(4)]
        np.testing.assert_array_equal(one_by_one, searched[:4])  # searches that take turns do not change each other
    assert np.mean(agrees) >= 0.98


def test_end_to_end(real, f32_model):
    path, _, windows = real
    scan, hnsw, lists = (fidelity(f32_model, path, windows, lookup=lookup) for lookup in ("scan", "hnsw", "lists"))
    assert abs(hnsw["kl_mean"] / scan["kl_mean"] - 1) < 0.02
    assert lists["kl_mean"] / scan["kl_mean"] - 1 < 0.02  # another entry can also be the better one
    assert scan["kl_mean"] < 0.5 * abs(scan["nll_none"] - scan["nll_full"])  # the memory stands for its prefix
    assert scan["nll_full"] < scan["nll_memory"] < scan["nll_none"]
