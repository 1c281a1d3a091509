"""The PyTorch reference and the llama.cpp runtime compute the same numbers from the same memory file."""

import numpy as np
import pytest
import torch

from attnmem_local import native
from attnmem_local.evaluate import Scorer, kl, log_softmax
from attnmem_local.memory import Memory
from attnmem_local.reference import memory_session, memory_state
from attnmem_local.runtime import MemoryLlama


@pytest.mark.parametrize("kind", ["exact", "fitted"])
def test_states(tiny, kind):
    path = tiny.save(getattr(tiny, kind)(), kind)
    memory = Memory.load(path)
    spec = memory.model
    llama = MemoryLlama(str(tiny.path), memory=path, verbose=False)
    q = 3 * np.random.default_rng(0).standard_normal((50, spec.head_count, spec.key_length)).astype(np.float32)
    grouped = torch.from_numpy(q).unflatten(1, (spec.head_count_kv, -1)).permute(1, 2, 0, 3).flatten(1, 2)
    for layer in range(spec.block_count):
        o, lse = memory_state(memory, layer, grouped)
        expected = torch.cat((o, lse[..., None]), dim=-1).unflatten(1, (-1, 50)).permute(2, 0, 1, 3).flatten(1, 2).numpy()
        got = native.state(llama.memories[0].memory.handle, layer, q, "scan")
        error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
        # the runtime rounds q to float16, so a few queries on the border of two cells may find the other entry
        assert np.mean(error < 2e-3) > 0.98
        assert np.median(error) < 1e-3


def test_logits(tiny):
    path = tiny.save(tiny.fitted(), "fitted")
    reference = memory_session(tiny.model, [Memory.load(path)]).run(tiny.model, torch.tensor([tiny.live]))[0]
    none = Scorer(tiny.path).log_probs(tiny.live)
    expected = log_softmax(reference.numpy())
    for lookup in native.LOOKUPS:
        got = Scorer(tiny.path, memory=path, lookup=lookup).log_probs(tiny.live)
        assert kl(expected, got).mean() < 0.02 * kl(expected, none).mean()


def test_the_stock_path_and_the_cpu_op_agree(tiny):
    path = tiny.save(tiny.fitted(), "fitted")
    stock = Scorer(tiny.path, memory=path, lookup="stock").log_probs(tiny.live)
    scan = Scorer(tiny.path, memory=path, lookup="scan").log_probs(tiny.live)
    assert kl(stock, scan).mean() < 1e-5
