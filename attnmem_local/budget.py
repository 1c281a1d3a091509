"""Which KV head gets how many anchors: bytes go where they lower the KL of the output most."""

import heapq
import math
from dataclasses import dataclass
from typing import Callable, Literal

import gguf
import numpy as np
import torch

from .capture import PrefixKV, capture
from .entries.centroid import EntryState, Metric
from .entries.anchor import CHOICE_QUERIES, anchor_state, fit_anchors, matching_pursuit, rms_attention
from .entries.target import Target
from .memory import ModelSpec
from .progress import Progress
from .sensitivity import sensitivity

PROBE = 64  # anchors that every head is tried with
PROBES = (16, 256)  # and those that matter also with these
PROBED_SHARE = 0.995  # of the KL at PROBE: heads that carry it matter
SIZES = (2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


WINDOWS = 5  # of live text that the curves are measured on


@dataclass
class Plan:
    """What every KV head gets. A head with as many anchors as the prefix has tokens keeps them as they are."""

    anchors: np.ndarray  # int64 [n_layer, n_head_kv]
    entries: np.ndarray  # int64 [n_layer, n_head_kv], looked up: residuals for heads with anchors, else `table`
    name: str  # how it came about
    table: Literal["centroid", "tangent"] = "centroid"
    metric: Metric = "l2"
    state: EntryState = "mean"
    eight_bit: bool = False  # Q8_0 tables instead of float16
    tune_steps: int = 150


def uniform_plan(spec: ModelSpec, anchors: int = 0, entries: int = 0, **options) -> Plan:
    """The same for every head."""
    shape = spec.block_count, spec.head_count_kv
    return Plan(np.full(shape, anchors), np.full(shape, entries), f"{anchors} anchors and {entries} entries per KV head", **options)


def plan_for_bytes(model, kv: PrefixKV, windows: list[list[int]], nbytes: int, seed: int, progress: Progress) -> Plan:
    """The best split of a number of bytes over the heads, for live text like these windows."""
    eight_bit = model.spec.key_length % 32 == 0 and model.spec.value_length % 32 == 0
    with progress.stage("sensitivity") as step:
        felt = sensitivity(model, kv, windows, seed, step)
    with progress.stage("budget", model.spec.block_count * model.spec.head_count_kv) as step:
        targets = capture(model, kv, windows[:: max(1, len(windows) // WINDOWS)][:WINDOWS])
        found = curves(model, kv, targets, felt, step)
    anchors = split(found, nbytes, bytes_per_anchor(model.spec, eight_bit))
    return Plan(anchors, np.zeros_like(anchors), f"{nbytes} bytes", eight_bit=eight_bit)


def bytes_per_anchor(spec: ModelSpec, eight_bit: bool) -> int:
    """Key, value and float32 bias."""
    n = spec.key_length + spec.value_length
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0]
    return (n // block * size if eight_bit else 2 * n) + 4


@dataclass
class Curve:
    """KL that a KV head adds with n anchors: measured points, joined in logarithms; none is left with all P keys."""

    n: list[int]
    kl: list[float]
    n_prefix: int

    def at(self, n: int) -> float:
        if n >= self.n_prefix:
            return 0.0
        x, y = np.log(self.n), np.log(np.maximum(self.kl, 1e-12))
        if len(x) == 1:
            return float(np.exp(y[0] - (math.log(n) - x[0])))  # one point: error as 1/n
        i = int(np.clip(np.searchsorted(x, math.log(n)) - 1, 0, len(x) - 2))
        slope = min(0.0, (y[i + 1] - y[i]) / (x[i + 1] - x[i]))
        return float(np.exp(y[i] + slope * (math.log(n) - x[i])))


def head_kl(target: Target, state, sensitivity: torch.Tensor, n_group: int) -> float:
    """Mean KL per position that a state adds in one KV head; sensitivity [d_v, d_v]."""
    error = target.error(state)
    return 0.5 * n_group * float((error @ sensitivity.to(error.device) * error).sum(-1).mean())


def curves(
    model, kv: PrefixKV, targets: list[Target], sensitivity: torch.Tensor, progress: Callable[[int], None] = lambda n: None
) -> list[list[Curve]]:
    """How the error of every layer and KV head falls with anchors, for the queries of this prefix.

    Every head is fitted with a few anchors on half of the queries, and judged on the other half.
    """
    spec = model.spec
    n_group = spec.head_count // spec.head_count_kv

    def kl(il: int, h: int, n: int, choice=None) -> float:
        k, v = kv.k[il][h], kv.v[il][h]
        target = targets[il].head(h)
        fit, judge = target[0::2], target[1::2]
        fit = fit[:: -(-len(fit) // CHOICE_QUERIES)]
        chosen = rms_attention(fit, k, n, spec.scale) if choice is None else choice[:n]
        return head_kl(judge, anchor_state(fit_anchors(fit, k[chosen], v[chosen], spec.scale), judge.q, spec.scale), sensitivity[il, h], n_group)

    n_prefix = kv.k[0].shape[1]
    heads = [(il, h) for il in range(spec.block_count) for h in range(spec.head_count_kv)]
    found = {}
    for il, h in heads:
        n = min(PROBE, n_prefix)
        found[il, h] = Curve([n], [kl(il, h, n)], n_prefix)
        progress(1)
    left = (1 - PROBED_SHARE) * sum(c.kl[0] for c in found.values())
    for (il, h), curve in sorted(found.items(), key=lambda item: item[1].kl[0]):
        left -= curve.kl[0]
        if left > 0 or n_prefix <= max(PROBES):
            continue
        target = targets[il].head(h)[0::2]
        target = target[:: -(-len(target) // CHOICE_QUERIES)]
        choice = matching_pursuit(target, kv.k[il][h], kv.v[il][h], max(PROBES), spec.scale)
        sizes = sorted({*PROBES, PROBE})
        found[il, h] = Curve(sizes, [kl(il, h, n, choice) for n in sizes], n_prefix)
    return [[found[il, h] for h in range(spec.head_count_kv)] for il in range(spec.block_count)]


def split(curves: list[list[Curve]], nbytes: int, bytes_per_anchor: int) -> np.ndarray:
    """Anchors per layer and KV head within a number of bytes: int64 [n_layer, n_head_kv].

    Greedy over sizes: the step that lowers the KL most for its bytes comes first. A step may be several sizes wide, so
    that a head can go straight to all of its keys.
    """
    n_prefix = curves[0][0].n_prefix
    sizes = sorted({min(n, n_prefix) for n in (*SIZES, n_prefix)})
    n = np.full((len(curves), len(curves[0])), sizes[0], dtype=np.int64)
    left = nbytes // bytes_per_anchor - n.sum()
    if left < 0:
        need = n.sum() * bytes_per_anchor
        raise ValueError(f"{nbytes} bytes are too few for this model: it needs at least {need}, {sizes[0]} anchors for each KV head")

    def best(il: int, h: int, room: int):
        now = curves[il][h].at(n[il, h])
        steps = [(-(now - curves[il][h].at(m)) / (m - n[il, h]), m) for m in sizes if n[il, h] < m <= n[il, h] + room]
        return min(steps, default=None)

    queue = [(*step, il, h) for il in range(len(n)) for h in range(n.shape[1]) if (step := best(il, h, left))]
    heapq.heapify(queue)
    while queue:
        _, m, il, h = heapq.heappop(queue)
        if m - n[il, h] <= left:
            left -= m - n[il, h]
            n[il, h] = m
        if step := best(il, h, left):
            heapq.heappush(queue, (*step, il, h))
    return n
