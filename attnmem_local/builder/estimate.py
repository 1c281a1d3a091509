"""How long a build will take on this machine, from short trials of its steps.

A trial runs the loaded model after made-up keys and values, as many as the prefix will have, and fits one head to random
queries. So the estimate reflects the speed of this machine, of this model and of whatever else runs now. It takes seconds.
"""

import math
import time
from collections.abc import Callable

import torch

from .budget import PROBE, head_bytes, tune_steps
from .capture import Live, Packed, PrefixKV
from .entries.anchor import CHOICE_QUERIES, anchor_state, fit_anchors, matching_pursuit, rms_attention, tune
from .entries.head import fits_eight_bit
from .entries.target import Target
from .job import Build
from .model import BuildModel
from .search.kmeans import cluster
from .sensitivity import TOKENS as SENSITIVITY_TOKENS
from .sensitivity import is_cached
from .sources.self_study import draw

TRIAL_TOKENS = 128  # tokens in a trial pass of the model
TRIAL_STEPS = 4  # steps of self-study, and of tuning, in a trial
TRIAL_QUERIES = 512  # queries that a trial sorts into clusters
BACKWARD = 3  # time of a pass with its gradient, divided by the time of a pass


def estimate_seconds(build: Build, anchor_bytes: int, n_entries: float, has_budget: bool) -> float:
    """Seconds that a build will take once the model is loaded.

    anchor_bytes: of all segments to fit. n_entries: looked-up entries per KV head, the mean over heads. has_budget: whether
    the build has to find out which head gets how many anchors.
    """
    spec, n_prefix = build.model.spec, len(build.prefix.tokens)
    n_live = sum(source.n_tokens for source in build.sources)
    token, step = _model_seconds(build.model, n_prefix, max([1, *(source.written[0] for source in build.sources)]))
    passes = n_prefix + n_live * (2 if has_budget else 1)  # prefill, the curves of the budget, the fit
    if has_budget and not is_cached(build.model):
        passes += BACKWARD * min(SENSITIVITY_TOKENS, n_live)
    seconds = token * passes + step * sum(source.written[1] for source in build.sources)
    if build.segments:
        n_heads = len(build.segments) * spec.block_count * spec.head_count_kv
        n_anchors = anchor_bytes / n_heads / head_bytes(spec, 1, 2, fits_eight_bit(spec))
        n_tokens = sum(build.segment_tokens()) // len(build.segments)
        seconds += n_heads * _head_seconds(build.model, n_tokens, build.n_group * n_live, n_anchors, n_entries, has_budget)
    return seconds


@torch.no_grad()
def _model_seconds(model: BuildModel, n_prefix: int, windows: int) -> tuple[float, float]:
    """Seconds per token of a long pass, and per step of self-study that writes a number of windows at a time."""
    spec, devices = model.spec, [model.device_of(il) for il in range(model.spec.block_count)]
    k, v = (_noise(model, spec.head_count_kv, n_prefix, d) for d in (spec.key_length, spec.value_length))
    tables = {device: (k.to(device), v.to(device)) for device in set(devices)}  # shared by all layers of a device
    kv = PrefixKV([tables[device][0] for device in devices], [tables[device][1] for device in devices])
    session, generator = Live(kv.state), torch.Generator().manual_seed(0)
    tokens = torch.zeros(windows, 1, dtype=torch.long)

    def step():
        draw(session.run(model, tokens)[:, -1], generator)

    step()  # warm up
    writing = _seconds(model, lambda: [step() for _ in range(TRIAL_STEPS)]) / TRIAL_STEPS
    packed = Packed(kv, [[0] * TRIAL_TOKENS], lambda layer, target: None)
    return _seconds(model, lambda: packed.run(model, logits_to_keep=1)) / TRIAL_TOKENS, writing


def _head_seconds(model: BuildModel, n_tokens: int, n_q: int, n_anchors: float, n_entries: float, has_budget: bool) -> float:
    """Seconds for one KV head of a segment of n_tokens, with n_q queries: its curve for the budget, its fit, its table."""
    spec = model.spec
    n = min(n_tokens, max(1, round(n_anchors))) if n_anchors else 0
    k, v = (_noise(model, n_tokens, d) for d in (spec.key_length, spec.value_length))
    q, o, live_o = (_noise(model, n_q, d) for d in (spec.key_length, spec.value_length, spec.value_length))
    lse = q.new_full((n_q,), 5.0)
    target = Target(q, o, lse, live_o, lse)
    thinned = target.thinned(CHOICE_QUERIES)

    def fitted(chosen):
        return fit_anchors(thinned, k[chosen], v[chosen], spec.scale)

    def once():
        if has_budget:
            anchors = fitted(rms_attention(thinned, k, min(PROBE, n_tokens), spec.scale))
            target.error(anchor_state(anchors, q, spec.scale))
        fitted(matching_pursuit(thinned, k, v, n, spec.scale))

    def tuned(steps: int):
        tune(start, target, spec.scale, steps, torch.Generator().manual_seed(0))

    def clustered():
        cluster(q[:TRIAL_QUERIES], math.ceil(n_entries), torch.Generator().manual_seed(0))

    seconds = 0.0
    if n:
        start = fitted(torch.arange(n, device=k.device))
        tuned(1)  # warm up
        seconds += _seconds(model, once) + _seconds(model, lambda: tuned(TRIAL_STEPS)) * tune_steps(n_tokens) / TRIAL_STEPS
    if n_entries:
        n_trial = min(TRIAL_QUERIES, n_q)
        seconds += _seconds(model, clustered) * n_q / n_trial * max(1, n_entries / n_trial)  # as many centers as queries at most
    return seconds


def _noise(model: BuildModel, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(model.device)


def _seconds(model: BuildModel, run: Callable) -> float:
    _finish(model)
    start = time.monotonic()
    run()
    _finish(model)
    return time.monotonic() - start


def _finish(model: BuildModel) -> None:
    """Wait for all GPUs, which work asynchronously."""
    if model.device.type == "cuda":
        for i in range(torch.cuda.device_count()):
            torch.cuda.synchronize(i)
