"""Fitting: what a layer is shown, how entries are chosen and fitted, and where the bytes go."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from attnmem_local.builder.budget import Curve, plan_for_bytes, split, uniform_plan
from attnmem_local.builder.build import build_memory, default_bytes, fit_memory
from attnmem_local.builder.capture import Live, Packed, PrefixKV, capture, prefill, spread
from attnmem_local.builder.entries import token
from attnmem_local.builder.entries.anchor import (
    anchor_state,
    exact_anchors,
    fit_anchors,
    fit_best_anchors,
    matching_pursuit,
    rms_attention,
    tune,
)
from attnmem_local.builder.entries.centroid import cluster
from attnmem_local.builder.entries.head import join_heads
from attnmem_local.builder.entries.residual import residual_entries
from attnmem_local.builder.entries.tangent import tangent_entries
from attnmem_local.builder.entries.target import Target
from attnmem_local.builder.fidelity import held_out_fidelity
from attnmem_local.builder.model import BuildModel
from attnmem_local.builder.progress import Progress
from attnmem_local.builder.search.token_graph import token_graph
from attnmem_local.builder.sensitivity import measure, sensitivity
from attnmem_local.builder.state import exact_state
from attnmem_local.engine import native
from attnmem_local.evaluate.scorer import Scorer, kl
from attnmem_local.memory.entries import LayerMemory
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.prefix import Prefix
from attnmem_local.memory.tables import rows
from attnmem_local.runtime.llama import MemoryLlama

WINDOWS = np.random.default_rng(8).integers(300, 1024, (6, 64)).tolist()


@dataclass
class Real:
    """A short real prefix on the default model."""

    model: BuildModel
    prefix: Prefix
    kv: PrefixKV
    windows: list[list[int]]
    targets: list[Target]


@pytest.fixture(scope="module")
def short(default_build_model, readme_tokens):
    model, tokens = default_build_model, readme_tokens
    kv = prefill(model, tokens[:384])
    windows = [tokens[i : i + 256] for i in range(384, 384 + 4 * 256, 256)]
    return Real(model, Prefix(tokens[:384], ""), kv, windows, capture(model, kv, windows[:3]))


@pytest.fixture(scope="module")
def head(short):
    """Target, keys and values of one KV head, a retrieval head, and the scale."""
    return short.targets[7].head(2), short.kv.k[7][2], short.kv.v[7][2], short.model.spec.scale


def error(target, state) -> float:
    return float(target.error(state).square().mean())


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


def test_tuning_to_few_queries_is_not_trusted(head):
    target, k, v, scale = head
    few = target[:160]
    judge = few[140:]
    n_steps = {steps: fit_best_anchors(few, k, v, 24, scale, steps, torch.Generator().manual_seed(0)) for steps in (0, 300)}
    errors = [error(judge, anchor_state(anchors, judge.q, scale)) for anchors in n_steps.values()]
    assert errors[1] <= errors[0]


def test_a_tangent_is_a_lower_bound_that_touches_at_its_centroid(head):
    target, k, v, scale = head
    entries = tangent_entries(target.q[:50], target.o[:50], k, scale)
    bound = target.q @ entries.key.T + entries.bias
    assert (bound <= target.lse[:, None] + 1e-2 * target.lse.abs().max()).all()
    assert torch.allclose(bound[:50].diagonal(), target.lse[:50], atol=1e-2)


def test_residuals_mend_the_anchors(head):
    target, k, v, scale = head
    chosen = rms_attention(target, k, 8, scale)
    anchors = anchor_state(exact_anchors(k[chosen], v[chosen]), target.q, scale)
    place, group = cluster(target.q, 100, "l2", torch.Generator().manual_seed(0))
    residual = residual_entries(place, group, target, anchors)
    mended = anchors[0] + residual.value[group], anchors[1] + residual.lse[group]
    assert error(target, mended) < 0.8 * error(target, anchors)


def test_keys_of_8_bits_keep_the_scores_of_their_places(head):
    target = head[0]
    place, group = cluster(target.q, 300, "l2", torch.Generator().manual_seed(0))
    entries = residual_entries(place, group, target, (target.o, target.lse))
    half, eight = (join_heads([entries], lambda x: x, eight_bit) for eight_bit in (False, True))
    assert eight.key.dtype == np.uint8
    score_half, score_eight = ((place.numpy() * rows(table.key)).sum(1) + table.bias for table in (half, eight))
    np.testing.assert_allclose(score_half, score_eight, rtol=1e-5)


def test_sensitivity_predicts_the_kl_of_a_small_error(tiny):
    """Half of error·S·error against the KL that is measured when one head is off by it."""
    felt = measure(tiny.model, tiny.kv, WINDOWS * 4, seed=0)
    layer, h, g = 1, 1, 2
    spec = tiny.model.spec
    noise = {}

    def disturb(il, target):
        if il != layer:
            return None
        delta = torch.zeros_like(target.o)
        delta[h] = 0.02 * torch.randn(target.o.shape[1:], generator=torch.Generator().manual_seed(1))
        noise["error"] = target.head(h).error((target.o[h] + delta[h], target.lse[h]))
        return target.o + delta, target.lse

    with torch.no_grad():
        log_p, log_q = (
            Packed(tiny.kv, WINDOWS, visit).run(tiny.model).log_softmax(-1) for visit in (lambda layer, target: None, disturb)
        )
    measured = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    e = noise["error"]
    predicted = 0.5 * g * float((e @ felt[layer, h] * e).sum(-1).mean())
    assert spec.head_count // spec.head_count_kv == g
    assert predicted == pytest.approx(measured, rel=0.5)


def test_sensitivity_is_measured_once_per_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = sensitivity(tiny.model, tiny.kv, WINDOWS, seed=0)
    assert torch.equal(first, sensitivity(tiny.model, tiny.kv, WINDOWS[3:], seed=1))


def test_bytes_go_where_they_help():
    steep, flat = (Curve([16, 64, 256], [c, c / 4, c / 16], 1000) for c in (1e-2, 1e-6))
    curves = {(0, 0, 0): steep, (0, 0, 1): flat, (0, 1, 0): flat, (0, 1, 1): flat}

    def cost(n, n_tokens):
        return 10 * n

    n = split(curves, 400 * 10, cost)
    assert sum(n.values()) <= 400 and n[0, 0, 0] > 300
    assert set(split(curves, 4000 * 10, cost).values()) == {1000}  # enough for all
    with pytest.raises(ValueError, match="the least is 80"):
        split(curves, 79, cost)


def test_a_budget_is_kept_and_beats_a_uniform_one(short):
    nbytes = short.model.spec.kv_bytes_per_token() * 384 // 16
    plan = plan_for_bytes(short.model, short.kv, short.windows[:3], nbytes, short.prefix.offset, [0], 0, Progress(quiet=True))
    assert plan.eight_bit and plan.anchors.max() > 4 * plan.anchors.min()
    plan.tune_steps = 0  # without tuning, which takes most of the time
    uniform = uniform_plan(short.model.spec, anchors=int(plan.anchors.mean()), tune_steps=0, eight_bit=True)
    kl = []
    for p in (plan, uniform):
        memory = fit_memory(short.model, short.prefix, short.kv, short.windows[:3], p)
        assert memory.nbytes() < 1.01 * nbytes  # offsets are not counted
        kl.append(held_out_fidelity(short.model, short.kv, memory, short.windows[3:])["kl_mean"])
    assert kl[0] < 0.7 * kl[1]


def test_what_has_all_keys_is_exact(tiny):
    memory = fit_memory(tiny.model, tiny.prefix, tiny.kv, WINDOWS, uniform_plan(tiny.model.spec, anchors=240))
    result = held_out_fidelity(tiny.model, tiny.kv, memory, [tiny.live])
    assert result["kl_mean"] < 1e-5 < 1e-2 < result["kl_none"]
    assert result["nll_memory"] == pytest.approx(result["nll_full"], abs=1e-3)


def test_size_is_given_once(tiny):
    with pytest.raises(ValueError, match="either"):
        build_memory(tiny.model, tiny.prefix, share=0.5, nbytes=1000)


def test_exact_heads_of_long_prefixes_are_looked_up(tiny, monkeypatch):
    """The tokens with the largest logits are exact, and anchors stand for the rest."""
    monkeypatch.setattr(token, "LONG", 100)
    memory = fit_memory(tiny.model, tiny.prefix, tiny.kv, WINDOWS, uniform_plan(tiny.model.spec, anchors=240))
    assert (memory.n_entries("token") == 240).all() and (memory.n_entries("anchor") == token.REST).all()
    result = held_out_fidelity(tiny.model, tiny.kv, memory, [tiny.live])
    assert result["kl_mean"] < 0.05 * result["kl_none"]
    path = tiny.save(memory, "token")
    exact = Scorer(tiny.path, tiny.prefix.tokens, n_live=len(tiny.live)).log_probs(tiny.live)
    for lookup in ("stock", "hnsw"):
        got = Scorer(tiny.path, memory=path, lookup=lookup).log_probs(tiny.live)
        assert kl(exact, got).mean() < 0.06 * result["kl_none"]


def test_what_a_query_attends_is_found(default_build_model, default_model, readme_tokens, tmp_path):
    """Over links made from queries the search covers the mass of the true top k, for queries that made no links."""
    model, il, n = default_build_model, 7, 1024
    windows = [readme_tokens[i : i + 256] for i in range(n, n + 6 * 256, 256)]
    kv = prefill(model, readme_tokens[:n])
    q = capture(model, kv, windows[:-1])[il].q
    live = model.to_gguf_order(capture(model, kv, windows[-1:])[il].q).unflatten(1, (-1, 256))  # [n_head_kv, g, n_tokens, d_k]

    heads = [exact_anchors(k, v) for k, v in zip(kv.k[il], kv.v[il])]
    tokens = join_heads(heads, model.to_gguf_order)
    tokens.graph = token_graph([h.key.numpy() for h in heads], list(q.numpy()))
    path = tmp_path / "tokens.mem.gguf"
    layers = [{il: LayerMemory(token=tokens)}]
    Memory(model.spec, readme_tokens[:n], "", layers, [0, n], token_top_k=token.TOP_K).save(path)

    llama = MemoryLlama(str(default_model), memory=path, verbose=False)
    live = live.permute(2, 0, 1, 3).flatten(1, 2).contiguous().numpy()
    lse = [native.state(llama.memories[0].memory.handle, il, live, lookup)[..., -1] for lookup in ("hnsw", "scan")]
    mass = np.exp(lse[0] - lse[1])
    assert mass.mean() > 0.995 and np.quantile(mass, 0.05) > 0.98


def test_every_key_can_be_reached():
    """Also those that no query retrieves."""
    rng = np.random.default_rng(0)
    keys = [rng.standard_normal((n, 8)).astype(np.float32) for n in (0, 1, 400)]
    queries = [rng.standard_normal((3, 8)).astype(np.float32) for _ in keys]
    graph = token_graph(keys, queries)
    link = graph.link0[1:]
    reached = {int(graph.entry[2])}
    border = reached
    while border:
        border = {j for i in border for j in link[i].tolist() if j >= 0} - reached
        reached = reached | border
    assert len(reached) == 400


def test_the_default_memory_of_a_long_prefix_stops_growing():
    assert default_bytes(kv_bytes=8_000, n_parameters=10**9) == 1_000
    assert default_bytes(kv_bytes=10**10, n_parameters=10**9) == default_bytes(kv_bytes=10**11, n_parameters=10**9) < 10**9 / 16
