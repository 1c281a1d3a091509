"""How long a build will take on this machine, from short trials of its steps.

A trial runs the loaded model after made-up keys and values, as many as the prefix will have, and fits one head to random
queries. So it knows the speed of this machine, of this model, and of whatever else runs now, and takes a few seconds.
"""

import time
from collections.abc import Callable

import torch

from .budget import PROBE, fits_eight_bit, head_bytes, tune_steps
from .capture import Live, Packed, PrefixKV
from .entries.anchor import CHOICE_QUERIES, anchor_state, fit_anchors, matching_pursuit, rms_attention, tune
from .entries.target import Target
from .model import BuildModel
from .sensitivity import TOKENS as SENSITIVITY_TOKENS
from .sensitivity import is_cached
from .sources.self_study import draw

TRIAL_TOKENS = 128  # of one pass of the model
TRIAL_STEPS = 4  # of self-study, and of tuning
BACKWARD = 3  # a pass and its gradient take so many times as long as a pass alone


def estimate_seconds(
    model: BuildModel, n_prefix: int, segments: list[int], n_live: int, n_written: int, windows: int, nbytes: int
) -> float:
    """Seconds that a build will take once the model is loaded.

    n_prefix: tokens of the prefix; segments: tokens of each segment of it that is built, with nbytes for all of them.
    n_live: tokens of live text to build from; n_written: those of them that self-study writes, in so many windows at a time.
    """
    token, step = _model_seconds(model, n_prefix, windows)
    passes = n_prefix + 2 * n_live  # prefill, the curves of the budget, the fit
    if not is_cached(model):
        passes += BACKWARD * min(SENSITIVITY_TOKENS, n_live)
    seconds = token * passes + step * n_written / windows
    if segments:
        n_heads = len(segments) * model.spec.block_count * model.spec.head_count_kv
        n_anchors = nbytes / n_heads / head_bytes(model.spec, 1, 2, fits_eight_bit(model.spec))
        seconds += n_heads * _head_seconds(model, sum(segments) // len(segments), n_live, n_anchors)
    return seconds


@torch.no_grad()
def _model_seconds(model: BuildModel, n_prefix: int, windows: int) -> tuple[float, float]:
    """What a token of a long pass takes, and what a step of self-study takes."""
    spec, devices = model.spec, [model.device_of(il) for il in range(model.spec.block_count)]
    k, v = (_noise(model, spec.head_count_kv, n_prefix, d) for d in (spec.key_length, spec.value_length))
    tables = {device: (k.to(device), v.to(device)) for device in set(devices)}  # shared by all layers of a device
    kv = PrefixKV([tables[device][0] for device in devices], [tables[device][1] for device in devices])
    session, generator = Live(kv.state), torch.Generator().manual_seed(0)
    tokens = torch.zeros(windows, 1, dtype=torch.long)

    def step():
        draw(session.run(model, tokens)[:, -1], generator)

    step()  # the first of all takes longer
    writing = _seconds(model, lambda: [step() for _ in range(TRIAL_STEPS)]) / TRIAL_STEPS
    packed = Packed(kv, [[0] * TRIAL_TOKENS], lambda layer, target: None)
    return _seconds(model, lambda: packed.run(model, logits_to_keep=1)) / TRIAL_TOKENS, writing


def _head_seconds(model: BuildModel, n_tokens: int, n_live: int, n_anchors: float) -> float:
    """What one KV head of a segment takes: its curve for the budget, and its fit."""
    spec = model.spec
    n = min(n_tokens, max(1, round(n_anchors)))
    k, v = (_noise(model, n_tokens, d) for d in (spec.key_length, spec.value_length))
    n_q = n_live * spec.head_count // spec.head_count_kv
    q, o, live_o = (_noise(model, n_q, d) for d in (spec.key_length, spec.value_length, spec.value_length))
    lse = q.new_full((n_q,), 5.0)
    target = Target(q, o, lse, live_o, lse)
    some = target.thinned(CHOICE_QUERIES)

    def fitted(chosen):
        return fit_anchors(some, k[chosen], v[chosen], spec.scale)

    def once():
        anchors = fitted(rms_attention(some, k, min(PROBE, n_tokens), spec.scale))
        target.error(anchor_state(anchors, q, spec.scale))
        fitted(matching_pursuit(some, k, v, n, spec.scale))

    def tuned(steps: int):
        tune(start, target, spec.scale, steps, torch.Generator().manual_seed(0))

    start = fitted(torch.arange(n, device=k.device))
    tuned(1)
    return _seconds(model, once) + _seconds(model, lambda: tuned(TRIAL_STEPS)) * tune_steps(n_tokens) / TRIAL_STEPS


def _noise(model: BuildModel, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(model.device)


def _seconds(model: BuildModel, run: Callable) -> float:
    _finish(model)
    start = time.monotonic()
    run()
    _finish(model)
    return time.monotonic() - start


def _finish(model: BuildModel) -> None:
    """Wait for all GPUs, which work on while Python goes on."""
    if model.device.type == "cuda":
        for i in range(torch.cuda.device_count()):
            torch.cuda.synchronize(i)
