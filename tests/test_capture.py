"""Running a model with the prefix outside of its context."""

import numpy as np
import torch

from attnmem_local.builder.capture import Live, Packed, capture, spread
from attnmem_local.builder.state import exact_state

WINDOWS = np.random.default_rng(8).integers(300, 1024, (6, 64)).tolist()


def test_packed_windows_are_those_run_alone(tiny):
    windows = [WINDOWS[0], WINDOWS[1][:20], WINDOWS[2][:30], WINDOWS[3][:10]]
    packed = Packed(tiny.kv, windows, lambda layer, target: None)
    with torch.no_grad():
        logits = packed.run(tiny.model)
    assert len(logits) < len(windows)
    for i, window in enumerate(windows):
        alone = Live(tiny.kv.state).run(tiny.model, torch.tensor([window]))[0]
        assert torch.allclose(logits[packed.window == i], alone, atol=1e-3)


def test_short_traces_are_sampled_as_many_as_long_ones():
    """By tokens: five windows of 384 tokens or a hundred and more of 15, from all over."""
    long, short = [[i] * 384 for i in range(20)], [[i] * 15 for i in range(500)]
    assert [w[0] for w in spread(long, 1920)] == [0, 4, 8, 12, 16]
    assert 1800 < sum(map(len, spread(short, 1920))) < 2040 and spread(short, 1920)[-1][0] > 480
    assert spread(long, 10) == long[:1] and spread(short[:3], 1920) == short[:3]


def test_a_target_is_what_the_head_computes(tiny):
    for target in capture(tiny.model, tiny.kv, WINDOWS[:2], first=[0, 700]):
        assert target.q.shape[:2] == (2, 2 * 2 * 64)  # KV heads; group of 2, 2 windows of 64
    for il, target in enumerate(capture(tiny.model, tiny.kv, WINDOWS[:1])):
        o, lse = exact_state(target.q, tiny.kv.k[il], tiny.kv.v[il], tiny.model.spec.scale)
        assert torch.allclose(o, target.o, atol=1e-3) and torch.allclose(lse, target.lse, atol=1e-3)
