"""The PyTorch reference and the llama.cpp runtime compute the same states and logits from a memory file."""

import numpy as np
import pytest
import torch
from helpers.mixed import mixed_memory, random_queries
from helpers.session import memory_session

from attnmem_local.builder.memory_state import memory_state
from attnmem_local.engine import native
from attnmem_local.evaluate.scorer import Scorer, kl, log_softmax
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.tables import rows
from attnmem_local.runtime.llama import MemoryLlama


def reference_states(memory, layer, q):
    """The reference for native.state: float32 [n_tokens, n_head, d_v + 1] for q [n_tokens, n_head, d_k]."""
    grouped = torch.from_numpy(q).unflatten(1, (memory.model.head_count_kv, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    o, lse = memory_state(memory, layer, grouped)
    return torch.cat((o, lse[..., None]), dim=-1).unflatten(1, (-1, len(q))).permute(2, 0, 1, 3).flatten(1, 2).numpy()


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


@pytest.mark.parametrize("kind", ["exact", "fitted"])
def test_states(tiny, kind):
    path = tiny.save(getattr(tiny, kind)(), kind)
    memory = Memory.load(path)
    spec = memory.model
    llama = MemoryLlama(str(tiny.path), memory=path, verbose=False)
    q = 3 * np.random.default_rng(0).standard_normal((50, spec.head_count, spec.key_length)).astype(np.float32)
    for layer in range(spec.block_count):
        error = relative_error(native.state(llama.memories[0].memory.handle, layer, q, "scan"), reference_states(memory, layer, q))
        # of two entries with nearly equal scores, rounding decides which one a query gets
        assert np.mean(error < 1e-4) > 0.99


@pytest.fixture(scope="module", params=[False, True], ids=["f16", "q8_0"])
def mixed(request, tiny32):
    return tiny32.save(mixed_memory(tiny32.model.spec, tiny32.prefix, request.param), f"mixed-{request.param}")


def test_states_of_all_kinds(tiny32, mixed):
    memory = Memory.load(mixed)
    spec = memory.model
    llama = MemoryLlama(str(tiny32.path), memory=mixed, verbose=False)
    handle = llama.memories[0].memory.handle
    q = random_queries(np.random.default_rng(1), 100, spec.head_count, spec.key_length)
    for layer in range(spec.block_count):
        error = relative_error(native.state(handle, layer, q, "scan"), reference_states(memory, layer, q))
        assert np.mean(error < 1e-4) > 0.99
        assert np.median(error) < 2e-5


@pytest.mark.parametrize("n_live", [1, 3, 40])
def test_the_stock_path_and_the_cpu_op_agree_on_all_kinds(tiny32, mixed, n_live):
    live = tiny32.live[:n_live]
    logits = {}
    for lookup in ("stock", "scan"):
        scorer = Scorer(tiny32.path, lookup=lookup)
        scorer.llama.attach(mixed, gain=0.5)
        logits[lookup] = scorer.log_probs(live)
    # where rounding gives a query another entry of nearly equal score, only the distribution at its token differs
    error = kl(logits["stock"], logits["scan"])
    assert np.median(error) < 1e-6 and error.mean() < 1e-3
    assert kl(logits["stock"], Scorer(tiny32.path).log_probs(live)).mean() > 0.01


@pytest.mark.parametrize("search", ["hnsw", "lists"])
def test_a_search_finds_what_a_scan_finds_in_all_kinds(tiny32, search):
    path = tiny32.save(mixed_memory(tiny32.model.spec, tiny32.prefix, q8_0=True, times=20), "large")
    llama = MemoryLlama(str(tiny32.path), memory=path, verbose=False)
    handle = llama.memories[0].memory.handle
    q = random_queries(np.random.default_rng(1), 100, tiny32.model.spec.head_count, 32)
    error = [relative_error(*(native.state(handle, layer, q, lookup) for lookup in (search, "scan"))) for layer in range(3)]
    assert np.mean(np.array(error) < 1e-4) > 0.97


@pytest.mark.parametrize("search", ["scan", "hnsw", "lists"])
def test_a_query_that_is_not_finite_harms_no_other(tiny32, search):
    path = tiny32.save(mixed_memory(tiny32.model.spec, tiny32.prefix, q8_0=True, times=20), "large")
    llama = MemoryLlama(str(tiny32.path), memory=path, verbose=False)
    handle = llama.memories[0].memory.handle
    q = random_queries(np.random.default_rng(1), 20, tiny32.model.spec.head_count, 32)
    expected = native.state(handle, 0, q, search)
    for bad in (np.nan, np.inf, 1e38):
        for dimensions in (slice(None), slice(3, 5)):
            broken = q.copy()
            broken[7, :, dimensions] = bad
            np.testing.assert_array_equal(np.delete(native.state(handle, 0, broken, search), 7, 0), np.delete(expected, 7, 0))


def test_logits(tiny):
    path = tiny.save(tiny.fitted(), "fitted")
    reference = memory_session(tiny.model, [Memory.load(path)]).run(tiny.model, torch.tensor([tiny.live]))[0]
    none = Scorer(tiny.path).log_probs(tiny.live)
    expected = log_softmax(reference.numpy())
    for lookup in native.LOOKUPS:
        actual = Scorer(tiny.path, memory=path, lookup=lookup).log_probs(tiny.live)
        assert kl(expected, actual).mean() < 0.02 * kl(expected, none).mean()


def test_the_stock_path_and_the_cpu_op_agree(tiny):
    memory = tiny.fitted()
    for layer in memory.layers[0].values():  # in float32: with float16 keys the stock path rounds q
        layer.centroid.key = rows(layer.centroid.key)
    path = tiny.save(memory, "fitted-f32")
    stock = Scorer(tiny.path, memory=path, lookup="stock").log_probs(tiny.live)
    scan = Scorer(tiny.path, memory=path, lookup="scan").log_probs(tiny.live)
    assert kl(stock, scan).mean() < 1e-5


@pytest.mark.parametrize("n_live", [1, 3, 90])
def test_flash_attention_merges_with_the_state(tiny32, mixed, n_live):
    live = tiny32.live[:n_live]
    plain = Scorer(tiny32.path, memory=mixed, lookup="stock").log_probs(live)
    none = kl(plain, Scorer(tiny32.path).log_probs(live)).mean()
    for kv_type, bound in ((1, 1e-4), (8, 0.02)):  # ggml types of the KV cache: F16, Q8_0
        flash = Scorer(tiny32.path, memory=mixed, flash_attn=True, type_k=kv_type, type_v=kv_type).log_probs(live)
        # the median ignores tokens at which rounding gives a query another entry of nearly equal score
        assert np.median(kl(plain, flash)) < bound * none
