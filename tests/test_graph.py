"""What memories add to a graph, and what a lookup costs, counted."""

import copy

import numpy as np
import pytest
from helpers.mixed import mixed_memory, random_queries

from attnmem_local.engine import native
from attnmem_local.evaluate.scorer import Scorer
from attnmem_local.runtime.llama import MemoryLlama


@pytest.mark.parametrize(
    "options", [{}, {"flash_attn": True}, {"flash_attn": True, "type_k": 8, "type_v": 8}], ids=["plain", "flash", "q8_0"]
)
@pytest.mark.parametrize("lookup", ["stock", "auto"])
def test_graphs_have_room_for_many_segments(tiny32, lookup, options):
    """llama.cpp aborts if a graph has more nodes than it was told."""
    if lookup == "stock" and "type_v" in options:
        pytest.skip("stock ops refuse a quantized cache")
    memory = mixed_memory(tiny32.model.spec, tiny32.prefix, q8_0=True)
    memory.layers = [copy.deepcopy(memory.layers[i % 3]) for i in range(60)]
    memory.segment_offset = [4 * i for i in range(61)]
    path = tiny32.save(memory, "many-segments")
    logits = Scorer(tiny32.path, memory=path, lookup=lookup, **options).log_probs(tiny32.live[:20])
    assert np.isfinite(logits).all()


def test_scored_entries_are_counted(tiny32):
    """Of a scan all entries that are looked up, of a search fewer; however many queries are searched together."""
    memory = mixed_memory(tiny32.model.spec, tiny32.prefix, q8_0=True, times=20)
    llama = MemoryLlama(str(tiny32.path), memory=tiny32.save(memory, "counted"), verbose=False)
    handle = llama.memories[0].memory.handle
    spec = memory.model
    q = random_queries(np.random.default_rng(1), 30, spec.head_count, spec.key_length)
    for layer in range(spec.block_count):
        of_layer = [layers[layer] for layers in memory.layers if layer in layers]
        entries = [e for part in of_layer for kind, e in vars(part).items() if e is not None and kind != "anchor"]
        everything = len(q) * spec.head_count // spec.head_count_kv * sum(len(e.key) for e in entries)
        states, n_scan = native.search(handle, layer, q, "scan")
        np.testing.assert_array_equal(states, native.state(handle, layer, q, "scan"))
        assert n_scan == everything
        for lookup in ("hnsw", "lists"):
            n_scored = native.search(handle, layer, q, lookup)[1]
            assert 0 < n_scored < 0.7 * everything
            assert n_scored == sum(native.search(handle, layer, q[i : i + 1], lookup)[1] for i in range(len(q)))
