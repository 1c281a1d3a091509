"""Which KV head gets how many anchors: bytes go where they lower the KL of the output most."""

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import gguf
import numpy as np
import torch

from ..memory.errors import BadInput
from ..memory.spec import ModelSpec
from .capture import PrefixKV, capture, spread
from .entries import token
from .entries.anchor import CHOICE_QUERIES, anchor_state, fit_anchors, matching_pursuit, rms_attention
from .entries.centroid import EntryState, Metric
from .entries.target import Target, segment_targets
from .progress import Progress
from .search.token_graph import LINK_BYTES
from .sensitivity import sensitivity

PROBE = 64  # anchors that every head is tried with
PROBES = (16, 256)  # and those that matter also with these
PROBED_SHARE = 0.995  # of the KL at PROBE: heads that carry it matter
SIZES = (2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
TOKENS = 1920  # of live text that the curves are measured on
LONG = 2048  # tokens from which on a prefix gets all the work that a build can do for it


@dataclass
class Plan:
    """What every KV head of every segment gets."""

    anchors: np.ndarray  # int64 [n_segment, n_layer, n_head_kv]; with as many as the segment has tokens they stay exact
    entries: np.ndarray  # int64 [n_segment, n_layer, n_head_kv], looked up: residuals for heads with anchors, else `table`
    name: str  # how it came about
    table: Literal["centroid", "tangent"] = "centroid"
    metric: Metric = "l2"
    state: EntryState = "mean"
    eight_bit: bool = False  # Q8_0 tables instead of float16
    tune_steps: int = 150  # of a long prefix


def effort(n_tokens: int, least: float) -> float:
    """The share of all work that so many tokens of a prefix are worth, but not less than `least`."""
    return min(1.0, max(least, n_tokens / LONG))


def tune_steps(n_tokens: int) -> int:
    """Steps of tuning for a segment of so many tokens: it has few anchors, which arrive soon."""
    return round(Plan.tune_steps * effort(n_tokens, 1 / 2))


def uniform_plan(spec: ModelSpec, anchors: int = 0, entries: int = 0, n_segment: int = 1, **options) -> Plan:
    """The same for every head."""
    shape = n_segment, spec.block_count, spec.head_count_kv
    return Plan(np.full(shape, anchors), np.full(shape, entries), f"{anchors} anchors and {entries} entries per KV head", **options)


def plan_for_bytes(
    model,
    kv: PrefixKV,
    windows: list[list[int]],
    nbytes: int,
    offset: list[int],
    segments: list[int],
    seed: int,
    progress: Progress,
) -> Plan:
    """The best split of a number of bytes over the heads of some segments, for live text like these windows."""
    spec = model.spec
    with progress.stage("sensitivity") as step:
        felt = sensitivity(model, kv, windows, seed, step)
    with progress.stage("budget", len(segments) * spec.block_count * spec.head_count_kv) as step:
        targets = capture(model, kv, spread(windows, TOKENS))
        found = curves(model, kv, targets, offset, segments, felt, step)
    anchors = np.zeros((len(offset) - 1, spec.block_count, spec.head_count_kv), dtype=np.int64)
    for head, n in split(found, nbytes, lambda n, n_tokens: head_bytes(spec, n, n_tokens, fits_eight_bit(spec))).items():
        anchors[head] = n
    steps = tune_steps(max(offset[s + 1] - offset[s] for s in segments))
    return Plan(anchors, np.zeros_like(anchors), f"{nbytes} bytes", eight_bit=fits_eight_bit(spec), tune_steps=steps)


def fits_eight_bit(spec: ModelSpec) -> bool:
    """Whether rows of keys and values can be Q8_0, which has blocks of 32 numbers."""
    return spec.key_length % 32 == 0 and spec.value_length % 32 == 0


def head_bytes(spec: ModelSpec, n: int, n_tokens: int, eight_bit: bool) -> int:
    """Bytes of n anchors for a segment of n_tokens tokens: keys, values, float32 bias, and links where they are looked up."""
    numbers = spec.key_length + spec.value_length
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
    row = (numbers // block * size if eight_bit else 2 * numbers) + 4
    if n >= n_tokens and token.looked_up(n_tokens):
        return (n + token.REST) * row + n * LINK_BYTES
    return n * row


def check_bytes(spec: ModelSpec, n_tokens: list[int], nbytes: int) -> None:
    """Raises BadInput if a number of bytes is too few for segments of so many tokens, before any work is done for them."""
    heads = spec.block_count * spec.head_count_kv
    least = heads * sum(head_bytes(spec, min(SIZES[0], n), n, fits_eight_bit(spec)) for n in n_tokens)
    if nbytes < least:
        raise BadInput(
            f"{nbytes} bytes are too few for this model and prefix: the least is {least}; give a larger --share or --bytes"
        )


@dataclass
class Curve:
    """KL that a KV head adds with n anchors: measured points, joined in logarithms; none is left with all tokens."""

    n: list[int]
    kl: list[float]
    n_tokens: int

    def at(self, n: int) -> float:
        if n >= self.n_tokens:
            return 0.0
        x, y = np.log(self.n), np.log(np.maximum(self.kl, 1e-12))
        if len(x) == 1:
            return float(np.exp(y[0] - (math.log(n) - x[0])))  # one point: error as 1/n
        i = int(np.clip(np.searchsorted(x, math.log(n)) - 1, 0, len(x) - 2))
        slope = min(0.0, (y[i + 1] - y[i]) / (x[i + 1] - x[i]))
        return float(np.exp(y[i] + slope * (math.log(n) - x[i])))


Head = tuple[int, int, int]  # segment, layer, KV head


def head_kl(target: Target, state, sensitivity: torch.Tensor, n_group: int) -> float:
    """Mean KL per position that a state adds in one KV head; sensitivity [d_v, d_v]."""
    error = target.error(state)
    return 0.5 * n_group * float((error @ sensitivity.to(error.device) * error).sum(-1).mean())


def curves(
    model,
    kv: PrefixKV,
    targets: list[Target],
    offset: list[int],
    segments: list[int],
    sensitivity: torch.Tensor,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[Head, Curve]:
    """How the error of every head of some segments falls with anchors, for the queries of this prefix.

    Every head is fitted with a few anchors on half of the queries, and judged on the other half.
    """
    spec = model.spec
    n_group = spec.head_count // spec.head_count_kv

    def kl(fit: Target, judge: Target, k, v, chosen, felt) -> float:
        fitted = fit_anchors(fit, k[chosen], v[chosen], spec.scale)
        return head_kl(judge, anchor_state(fitted, judge.q, spec.scale), felt, n_group)

    @lru_cache(maxsize=1)
    def of_layer(il: int) -> list[Target]:
        return segment_targets(targets[il], kv.k[il], kv.v[il], offset, spec.scale)

    def parts(head: Head):
        s, il, h = head
        target = of_layer(il)[s].head(h)
        own = slice(offset[s], offset[s + 1])
        return target[0::2].thinned(CHOICE_QUERIES), target[1::2], kv.k[il][h, own], kv.v[il][h, own]

    found: dict[Head, Curve] = {}
    for il, s, h in itertools.product(range(spec.block_count), segments, range(spec.head_count_kv)):
        fit, judge, k, v = parts((s, il, h))
        n = min(PROBE, len(k))
        found[s, il, h] = Curve([n], [kl(fit, judge, k, v, rms_attention(fit, k, n, spec.scale), sensitivity[il, h])], len(k))
        progress(1)
    left = (1 - PROBED_SHARE) * sum(c.kl[0] for c in found.values())
    matter = []
    for head, curve in sorted(found.items(), key=lambda item: item[1].kl[0]):
        left -= curve.kl[0]
        if left <= 0 and curve.n_tokens > max(PROBES):
            matter.append(head)
    for head in sorted(matter, key=lambda head: head[1]):
        fit, judge, k, v = parts(head)
        choice = matching_pursuit(fit, k, v, max(PROBES), spec.scale)
        sizes = sorted({*PROBES, PROBE})
        found[head] = Curve(sizes, [kl(fit, judge, k, v, choice[:n], sensitivity[head[1:]]) for n in sizes], len(k))
    return found


def split(curves: dict[Head, Curve], nbytes: int, cost: Callable[[int, int], int]) -> dict[Head, int]:
    """Anchors of each head within a number of bytes; cost(n, n_tokens) is what n anchors of a segment take.

    Greedy over sizes: the step that lowers the KL most for its bytes comes first. A step may be several sizes wide, so
    that a head can go straight to all of its tokens.
    """
    sizes = {head: sorted({min(n, c.n_tokens) for n in (*SIZES, c.n_tokens)}) for head, c in curves.items()}
    found = {head: s[0] for head, s in sizes.items()}
    need = sum(cost(n, curves[head].n_tokens) for head, n in found.items())
    left = nbytes - need
    if left < 0:
        raise BadInput(f"{nbytes} bytes are too few for this model and prefix: the least is {need}")

    def best(head: Head):
        curve, now = curves[head], found[head]
        steps = []
        for n in sizes[head]:
            price = cost(n, curve.n_tokens) - cost(now, curve.n_tokens)
            if n > now and price <= left:
                steps.append(((curve.at(n) - curve.at(now)) / price, n))
        return min(steps, default=None)

    queue = [(*step, head) for head in found if (step := best(head))]
    heapq.heapify(queue)
    while queue:
        _, n, head = heapq.heappop(queue)
        price = cost(n, curves[head].n_tokens) - cost(found[head], curves[head].n_tokens)
        if price <= left:
            left -= price
            found[head] = n
        if step := best(head):
            heapq.heappush(queue, (*step, head))
    return found
