"""Entry kinds: what a fit of one KV head gives."""

import numpy as np
import pytest
import torch

from attnmem_local.builder.capture import capture, prefill
from attnmem_local.builder.entries import KINDS
from attnmem_local.builder.entries.anchor import (
    anchor_state,
    exact_anchors,
    fit_anchors,
    fit_best_anchors,
    matching_pursuit,
    rms_attention,
    tune,
)
from attnmem_local.builder.entries.centroid import mean_state
from attnmem_local.builder.entries.head import join_heads
from attnmem_local.builder.entries.residual import residual_entries
from attnmem_local.builder.entries.tangent import tangent_entries
from attnmem_local.builder.search.kmeans import cluster
from attnmem_local.memory.entries import KINDS as FILE_KINDS
from attnmem_local.memory.tables import rows


@pytest.fixture(scope="module")
def head(default_build_model, readme_tokens):
    """Target, keys and values of one KV head, a retrieval head, of a short real prefix, and the scale."""
    model, tokens = default_build_model, readme_tokens
    kv = prefill(model, tokens[:384])
    targets = capture(model, kv, [tokens[i : i + 256] for i in range(384, 384 + 3 * 256, 256)])
    return targets[7].head(2), kv.k[7][2], kv.v[7][2], model.spec.scale


def test_every_kind_of_the_file_is_registered():
    assert {kind.name for kind in KINDS} == {kind.name for kind in FILE_KINDS}
    assert [kind.name for kind in KINDS if kind.corrects] == ["residual"]


def error(target, state) -> float:
    return float(target.error(state).square().mean())


@pytest.mark.slow
def test_each_step_of_the_fit_lowers_the_error(head):
    """Chosen keys as they are, fitted in closed form, tuned: each is better, and all keys are exact."""
    target, k, v, scale = head
    for choice in (rms_attention(target, k, 24, scale), matching_pursuit(target, k, v, 24, scale)):
        assert len(set(choice.tolist())) == 24
        plain = exact_anchors(k[choice], v[choice])
        fitted = fit_anchors(target, k[choice], v[choice], scale)
        tuned = tune(fitted, target, scale, 100, torch.Generator().manual_seed(0))
        errors = [error(target, anchor_state(anchors, target.q, scale)) for anchors in (plain, fitted, tuned)]
        assert errors == sorted(errors, reverse=True)
    assert error(target, anchor_state(exact_anchors(k, v), target.q, scale)) < 1e-6 < errors[-1]


@pytest.mark.slow
def test_tuning_to_few_queries_is_not_trusted(head):
    target, k, v, scale = head
    few = target[:160]
    judge = few[140:]
    n_steps = {steps: fit_best_anchors(few, k, v, 24, scale, steps, torch.Generator().manual_seed(0)) for steps in (0, 300)}
    errors = [error(judge, anchor_state(anchors, judge.q, scale)) for anchors in n_steps.values()]
    assert errors[1] <= errors[0]


@pytest.mark.slow
def test_a_tangent_is_a_lower_bound_that_touches_at_its_centroid(head):
    target, k, _, scale = head
    entries = tangent_entries(target.q[:50], target.o[:50], k, scale)
    bound = target.q @ entries.key.T + entries.bias
    assert (bound <= target.lse[:, None] + 1e-2 * target.lse.abs().max()).all()
    assert torch.allclose(bound[:50].diagonal(), target.lse[:50], atol=1e-2)


@pytest.mark.slow
def test_residuals_mend_the_anchors(head):
    target, k, v, scale = head
    chosen = rms_attention(target, k, 8, scale)
    anchors = anchor_state(exact_anchors(k[chosen], v[chosen]), target.q, scale)
    center, group = cluster(target.q, 100, torch.Generator().manual_seed(0))
    residual = residual_entries(center, group, target, anchors)
    mended = anchors[0] + residual.value[group], anchors[1] + residual.lse[group]
    assert error(target, mended) < 0.8 * error(target, anchors)


@pytest.mark.slow
def test_keys_of_8_bits_keep_the_scores_of_their_centers(head):
    target = head[0]
    center, group = cluster(target.q, 300, torch.Generator().manual_seed(0))
    entries = residual_entries(center, group, target, (target.o, target.lse))
    half, eight = (join_heads([entries], lambda x: x, eight_bit) for eight_bit in (False, True))
    assert eight.key.dtype == np.uint8
    score_half, score_eight = ((center.numpy() * rows(table.key)).sum(1) + table.bias for table in (half, eight))
    np.testing.assert_allclose(score_half, score_eight, rtol=1e-5)


def test_mean_state_of_a_cluster():
    """Z is the mean of exp(lse), o the Z-weighted mean: equation 5 of arXiv 2605.18226."""
    o, lse = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]]), torch.tensor([0.0, float(np.log(3)), 2.0])
    mean, log_z = mean_state(o, lse, torch.tensor([0, 0, 1]))
    assert torch.allclose(log_z, torch.tensor([float(np.log(2)), 2.0]))
    assert torch.allclose(mean, torch.tensor([[0.25, 0.75], [5.0, 5.0]]))


def test_cluster():
    g = torch.Generator().manual_seed(0)
    groups = 10 * torch.randn(8, 4, generator=g)
    q = (groups[:, None] + 0.01 * torch.randn(8, 50, 4, generator=g)).flatten(0, 1)
    centroid, nearest = cluster(q, 32, torch.Generator().manual_seed(1))
    assert len(centroid) <= 32
    assert (q - centroid[nearest]).norm(dim=-1).max() < 0.1
    for i in range(len(centroid)):
        assert torch.allclose(centroid[i], q[nearest == i].mean(0), atol=1e-4)
    assert len(cluster(q[:5], 8, g)[0]) <= 5  # fewer queries than entries
    assert len(cluster(q[:1].repeat(9, 1), 8, g)[0]) == 1  # equal queries
