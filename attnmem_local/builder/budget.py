"""Which KV head gets how many anchors: bytes go where they lower the KL of the output most."""

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ..memory.errors import BadInput
from ..memory.spec import ModelSpec
from .capture import capture, spread
from .entries import KINDS, counts
from .entries.anchor import CHOICE_QUERIES, anchor_state, fit_anchors, matching_pursuit, rms_attention
from .entries.head import fits_eight_bit
from .entries.target import Target, segment_targets
from .job import Build, effort
from .sensitivity import sensitivity
from .state import State

PROBE = 64  # anchors that every head is tried with
PROBES = (16, 256)  # further numbers of anchors, for the heads that matter
PROBED_SHARE = 0.995  # the heads that matter carry this share of the KL at PROBE
SIZES = (2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
TOKENS = 1920  # tokens of live text that the curves are measured on
TUNE_STEPS = 150  # steps of tuning for a long prefix


@dataclass
class Plan:
    """What every KV head of every segment gets."""

    anchors: np.ndarray  # int64 [n_segment, n_layer, n_head_kv]; with as many as the segment has tokens they stay exact
    entries: np.ndarray  # int64 [n_segment, n_layer, n_head_kv], looked up: residuals over anchors, else `table`
    name: str  # for the memory file: how the plan was made
    table: str = "centroid"  # the kind of entries that is looked up in heads without anchors
    eight_bit: bool = False  # Q8_0 instead of float16
    tune_steps: int = TUNE_STEPS


def tune_steps(n_tokens: int) -> int:
    """Steps of tuning for a segment of n_tokens: a short one has few anchors, which converge soon."""
    return round(TUNE_STEPS * effort(n_tokens, 1 / 2))


def uniform_plan(spec: ModelSpec, anchors: int = 0, entries: int = 0, n_segment: int = 1, **options) -> Plan:
    """The same for every head. options: further fields of Plan."""
    shape = n_segment, spec.block_count, spec.head_count_kv
    return Plan(np.full(shape, anchors), np.full(shape, entries), f"{anchors} anchors and {entries} entries per KV head", **options)


def plan_for_bytes(build: Build, nbytes: int, entries: int | np.ndarray = 0) -> Plan:
    """The best split of a number of bytes into anchors for the heads of the segments to fit.

    entries: looked-up entries per KV head on top of the bytes; one number, or int64 [n_layer, n_head_kv].
    """
    spec = build.model.spec
    build.sensitivity = sensitivity(build)
    with build.progress.stage("budget", len(build.segments) * spec.block_count * spec.head_count_kv) as step:
        targets = capture(build.model, build.kv, spread(build.text.windows, TOKENS))
        head_curves = curves(build, targets, build.sensitivity, step)
    eight_bit = fits_eight_bit(spec)
    anchors = np.zeros((len(build.prefix.offset) - 1, spec.block_count, spec.head_count_kv), dtype=np.int64)
    for head, n in split(head_curves, nbytes, lambda n, n_tokens: head_bytes(spec, n, n_tokens, eight_bit)).items():
        anchors[head] = n
    name = f"{nbytes} bytes" + (f" and {np.max(entries)} entries per KV head" if np.any(entries) else "")
    steps = tune_steps(max(build.segment_tokens()))
    return Plan(anchors, np.zeros_like(anchors) + entries, name, eight_bit=eight_bit, tune_steps=steps)


def head_bytes(spec: ModelSpec, anchors: int, n_tokens: int, eight_bit: bool, entries: int = 0, table: str = "centroid") -> int:
    """Bytes of a KV head of a segment of n_tokens that a plan gives these numbers."""
    n = counts(anchors, entries, n_tokens, table)
    return sum(kind.nbytes(spec, n[kind.name], eight_bit) for kind in KINDS if kind.name in n)


def check_bytes(build: Build, nbytes: int) -> None:
    """Raises BadInput if a number of bytes is too small for the segments to fit, before any work is done for them."""
    spec = build.model.spec
    heads = spec.block_count * spec.head_count_kv
    least = heads * sum(head_bytes(spec, min(SIZES[0], n), n, fits_eight_bit(spec)) for n in build.segment_tokens())
    if nbytes < least:
        raise BadInput(
            f"{nbytes} bytes are too few for this model and prefix: the least is {least}; give a larger --share or --bytes"
        )


@dataclass
class Curve:
    """The KL that a KV head adds with n anchors: measured points, joined in logarithms; zero with all tokens."""

    n: list[int]
    kl: list[float]
    n_tokens: int

    def kl_of(self, n: int) -> float:
        if n >= self.n_tokens:
            return 0.0
        x, y = np.log(self.n), np.log(np.maximum(self.kl, 1e-12))
        if len(x) == 1:
            return float(np.exp(y[0] - (math.log(n) - x[0])))  # one point: the KL falls as 1/n
        i = int(np.clip(np.searchsorted(x, math.log(n)) - 1, 0, len(x) - 2))
        slope = min(0.0, (y[i + 1] - y[i]) / (x[i + 1] - x[i]))
        return float(np.exp(y[i] + slope * (math.log(n) - x[i])))


HeadId = tuple[int, int, int]  # segment, layer, KV head


def head_kl(target: Target, state: State, sensitivity: torch.Tensor, n_group: int) -> float:
    """Mean KL per position that a state adds in one KV head; sensitivity [d_v, d_v]."""
    error = target.error(state)
    return 0.5 * n_group * float((error @ sensitivity.to(error.device) * error).sum(-1).mean())


def curves(build: Build, targets: list[Target], sensitivity: torch.Tensor, progress: Callable[[int], None]) -> dict[HeadId, Curve]:
    """How the error of every head of the segments to fit falls with anchors, for the queries of this prefix.

    Every head is fitted with a few anchors on half of the queries and judged on the other half.
    targets: one per layer. progress: is told of each head.
    """
    kv, offset, scale = build.kv, build.prefix.offset, build.model.spec.scale

    def kl(fit: Target, judge: Target, k, v, chosen, head_sensitivity) -> float:
        fitted = fit_anchors(fit, k[chosen], v[chosen], scale)
        return head_kl(judge, anchor_state(fitted, judge.q, scale), head_sensitivity, build.n_group)

    @lru_cache(maxsize=1)
    def of_layer(il: int) -> list[Target]:
        return segment_targets(targets[il], kv.k[il], kv.v[il], offset, scale)

    def parts(head: HeadId):
        s, il, h = head
        target = of_layer(il)[s].head(h)
        segment = slice(offset[s], offset[s + 1])
        return target[0::2].thinned(CHOICE_QUERIES), target[1::2], kv.k[il][h, segment], kv.v[il][h, segment]

    result: dict[HeadId, Curve] = {}
    heads = itertools.product(range(build.model.spec.block_count), build.segments, range(build.model.spec.head_count_kv))
    for il, s, h in heads:
        fit, judge, k, v = parts((s, il, h))
        n = min(PROBE, len(k))
        result[s, il, h] = Curve([n], [kl(fit, judge, k, v, rms_attention(fit, k, n, scale), sensitivity[il, h])], len(k))
        progress(1)
    left = (1 - PROBED_SHARE) * sum(c.kl[0] for c in result.values())
    matter = []
    for head, curve in sorted(result.items(), key=lambda item: item[1].kl[0]):
        left -= curve.kl[0]
        if left <= 0 and curve.n_tokens > max(PROBES):
            matter.append(head)
    for head in sorted(matter, key=lambda head: head[1]):
        fit, judge, k, v = parts(head)
        choice = matching_pursuit(fit, k, v, max(PROBES), scale)
        sizes = sorted({*PROBES, PROBE})
        result[head] = Curve(sizes, [kl(fit, judge, k, v, choice[:n], sensitivity[head[1:]]) for n in sizes], len(k))
    return result


def split(curves: dict[HeadId, Curve], nbytes: int, cost: Callable[[int, int], int]) -> dict[HeadId, int]:
    """The anchors of each head within a number of bytes; cost(n, n_tokens) gives the bytes of n anchors in a segment.

    Greedy over sizes: the step that lowers the KL most for its bytes comes first. A step may skip sizes, so that a head
    can go straight to all of its tokens.
    """
    sizes = {head: sorted({min(n, c.n_tokens) for n in (*SIZES, c.n_tokens)}) for head, c in curves.items()}
    anchors = {head: s[0] for head, s in sizes.items()}
    need = sum(cost(n, curves[head].n_tokens) for head, n in anchors.items())
    left = nbytes - need
    if left < 0:
        raise BadInput(
            f"{nbytes} bytes are too few for this model and prefix: the least is {need}; give a larger --share or --bytes"
        )

    def best(head: HeadId):
        curve, now = curves[head], anchors[head]
        steps = []
        for n in sizes[head]:
            price = cost(n, curve.n_tokens) - cost(now, curve.n_tokens)
            if n > now and price <= left:
                steps.append(((curve.kl_of(n) - curve.kl_of(now)) / price, n))
        return min(steps, default=None)

    queue = [(*step, head) for head in anchors if (step := best(head))]
    heapq.heapify(queue)
    while queue:
        _, n, head = heapq.heappop(queue)
        price = cost(n, curves[head].n_tokens) - cost(anchors[head], curves[head].n_tokens)
        if price <= left:
            left -= price
            anchors[head] = n
        if step := best(head):
            heapq.heappush(queue, (*step, head))
    return anchors
