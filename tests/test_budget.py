"""Where the bytes of a memory go."""

import numpy as np
import pytest
import torch

from attnmem_local.builder.budget import Curve, plan_for_bytes, split, uniform_plan
from attnmem_local.builder.capture import Packed, prefill
from attnmem_local.builder.fidelity import held_out_fidelity
from attnmem_local.builder.fit import fit_memory
from attnmem_local.builder.job import Build, LiveText
from attnmem_local.builder.sensitivity import measure, sensitivity
from attnmem_local.builder.size import default_bytes
from attnmem_local.memory.prefix import Prefix

WINDOWS = np.random.default_rng(8).integers(300, 1024, (6, 64)).tolist()


def test_sensitivity_predicts_the_kl_of_a_small_error(tiny):
    """Half of error·S·error against the KL that is measured when one head is off by it."""
    fisher = measure(tiny.build(WINDOWS * 4), lambda n: None)
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
    predicted = 0.5 * g * float((e @ fisher[layer, h] * e).sum(-1).mean())
    assert spec.head_count // spec.head_count_kv == g
    assert predicted == pytest.approx(measured, rel=0.5)


def test_sensitivity_is_measured_once_per_model(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = sensitivity(tiny.build(WINDOWS))
    assert torch.equal(first, sensitivity(tiny.build(WINDOWS[3:], seed=1)))


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


@pytest.mark.slow
def test_a_budget_is_kept_and_beats_a_uniform_one(default_build_model, readme_tokens):
    model, tokens = default_build_model, readme_tokens
    windows = [tokens[i : i + 256] for i in range(384, 384 + 4 * 256, 256)]
    build = Build(model, Prefix(tokens[:384], ""), kv=prefill(model, tokens[:384]), text=LiveText(windows[:3]))
    nbytes = model.spec.kv_bytes_per_token() * 384 // 16
    plan = plan_for_bytes(build, nbytes)
    assert plan.eight_bit and plan.anchors.max() > 4 * plan.anchors.min()
    plan.tune_steps = 0  # without tuning, which takes most of the time
    uniform = uniform_plan(model.spec, anchors=int(plan.anchors.mean()), tune_steps=0, eight_bit=True)
    kl = []
    for p in (plan, uniform):
        memory = fit_memory(build, p)
        assert memory.nbytes() < 1.01 * nbytes  # offsets are not counted
        kl.append(held_out_fidelity(model, build.kv, memory, windows[3:])["kl_mean"])
    assert kl[0] < 0.7 * kl[1]


def test_what_has_all_keys_is_exact(tiny):
    memory = fit_memory(tiny.build(WINDOWS), uniform_plan(tiny.model.spec, anchors=240))
    result = held_out_fidelity(tiny.model, tiny.kv, memory, [tiny.live])
    assert result["kl_mean"] < 1e-5 < 1e-2 < result["kl_none"]
    assert result["nll_memory"] == pytest.approx(result["nll_full"], abs=1e-3)


def test_the_default_memory_of_a_long_prefix_stops_growing():
    assert default_bytes(kv_bytes=8_000, n_parameters=10**9) == 1_000
    assert default_bytes(kv_bytes=10**10, n_parameters=10**9) == default_bytes(kv_bytes=10**11, n_parameters=10**9) < 10**9 / 16
