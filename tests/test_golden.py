"""A memory file from November 2026, which keeps reader and writer from drifting away from the format together."""

from pathlib import Path

import numpy as np
import pytest
from test_parity import reference_states, relative_error

from attnmem_local.engine import native
from attnmem_local.memory.entries import KINDS
from attnmem_local.memory.memory import Memory
from attnmem_local.runtime.llama import MemoryLlama

GOLDEN = Path(__file__).parent / "golden"
PATH = GOLDEN / "version-2.mem.gguf"  # built for the fixture `tiny`; layer 1 has all kinds of entries, lists and graphs
STATES = GOLDEN / "version-2.states.npz"  # q, float32 [n_tokens, n_head, d_k], and the result of native.state for layers 0 and 1


def test_an_old_memory_is_read_as_before():
    memory = Memory.load(PATH)
    assert (len(memory.prefix_tokens), memory.prefix_tokens[:3], memory.segment_offset) == (240, [984, 752, 795], [0, 100, 240])
    assert memory.prefix_messages == [{"role": "system", "content": "Grüße\n"}]
    assert (memory.build, memory.token_top_k) == ({"queries": "repeat", "seed": 1, "share": 0.125}, 8)
    assert memory.fidelity["kl_none"] == 0.5
    assert {kind.name: int(memory.n_entries(kind.name).sum()) for kind in KINDS} == {
        "centroid": 12, "tangent": 10, "residual": 8, "token": 17, "anchor": 13,
    }  # fmt: skip


def test_an_old_memory_is_written_as_before(tmp_path):
    Memory.load(PATH).save(tmp_path / "again.mem.gguf")
    assert (tmp_path / "again.mem.gguf").read_bytes() == PATH.read_bytes()


@pytest.mark.parametrize("lookup", ["scan", "hnsw", "lists"])
def test_an_old_memory_answers_as_before(tiny, lookup):
    llama = MemoryLlama(str(tiny.path), memory=PATH, verbose=False)
    handle = llama.memories[0].memory.handle
    memory = Memory.load(PATH)
    with np.load(STATES) as expected:
        for layer, states in enumerate((expected["layer0"], expected["layer1"])):
            assert relative_error(native.state(handle, layer, expected["q"], lookup), states).max() < 1e-4
            assert relative_error(reference_states(memory, layer, expected["q"]), states).max() < 1e-4
