"""Anchors: keys and values that are attended, with logits scale·q·k + bias.

They are chosen from the keys of the prefix and fitted so that attention over n of them gives the states of attention over
all. Choice, biases and values follow attention matching (Fast KV Compaction via Attention Matching, arXiv 2602.16284), with
queries weighted by the share of attention they pay to the prefix. tune() then moves keys, biases and values together down
the gradient of the error that matters: that of the output of attention over prefix and live tokens.
"""

import math
from typing import TYPE_CHECKING

import torch

from ...memory.entries import Entries
from ...memory.memory import Memory
from ...memory.spec import ModelSpec
from ..state import State, merge, state_of_logits
from .head import HeadEntries, pair_bytes, round_to_half
from .kind import Head
from .target import Target

if TYPE_CHECKING:
    from ..job import Build

CHOICE_QUERIES = 4096  # queries that choose the keys and fit the closed forms
CANDIDATES = 2048  # keys with most attention, from which matching pursuit chooses
BATCH = 768  # queries in one step of tune()
LEARNING_RATE = 0.5  # divided by the root of the number of anchors; unit: standard deviations of keys and values


class Anchor:
    name = "anchor"
    corrects: str | None = None

    def fit(self, head: Head, n: int) -> HeadEntries:
        if n >= len(head.k):
            return exact_anchors(head.k, head.v)
        return fit_best_anchors(head.target, head.k, head.v, n, head.scale, head.tune_steps, head.generator)

    def state(self, entries: HeadEntries, q: torch.Tensor, memory: Memory) -> State:
        return state_of_logits(memory.model.scale * (q @ entries.key.T) + entries.bias, entries.value)

    def index(self, entries: Entries, heads: list[HeadEntries], target: Target, build: "Build") -> Entries:
        return entries  # all of them are attended

    def nbytes(self, spec: ModelSpec, n: int, eight_bit: bool) -> int:
        return n * (pair_bytes(spec, eight_bit) + 4)


def exact_anchors(k: torch.Tensor, v: torch.Tensor) -> HeadEntries:
    """Every key [P, d_k] and value [P, d_v] of the prefix as an anchor with bias 0: the exact memory."""
    return HeadEntries(key=round_to_half(k), bias=k.new_zeros(len(k)), value=v)


def anchor_state(anchors: HeadEntries, q: torch.Tensor, scale: float) -> State:
    """The state of attention over anchors for queries q [n_q, d_k], in one pass over the logits: tune() runs it in each step."""
    return state_of_logits(torch.addmm(anchors.bias, q, anchors.key.T, alpha=scale), anchors.value)


def fit_best_anchors(
    target: Target, k: torch.Tensor, v: torch.Tensor, n: int, scale: float, steps: int, generator: torch.Generator
) -> HeadEntries:
    """n anchors from keys k [P, d_k] and values v [P, d_v]: chosen by matching pursuit, fitted, and tuned.

    The last eighth of the queries comes from other windows. It judges whether tuning has overfitted.
    """
    judge, target = target[len(target) * 7 // 8 :], target[: len(target) * 7 // 8]
    thinned = target.thinned(CHOICE_QUERIES)
    chosen = matching_pursuit(thinned, k, v, n, scale)
    fitted = fit_anchors(thinned, k[chosen], v[chosen], scale)
    tuned = tune(fitted, target, scale, steps, generator)
    return min(fitted, tuned, key=lambda anchors: float(judge.error(anchor_state(anchors, judge.q, scale)).square().mean()))


def rms_attention(target: Target, k: torch.Tensor, n: int, scale: float) -> torch.Tensor:
    """Indices [n] of the keys [P, d_k] with the largest root mean square of attention."""
    return _attention(target, k, scale).square().sum(0).topk(n).indices


def matching_pursuit(target: Target, k: torch.Tensor, v: torch.Tensor, n: int, scale: float) -> torch.Tensor:
    """Indices [n] of keys that together reproduce the mass and the values of attention, in the order of choice.

    Orthogonal matching pursuit with weights w ≥ 0 on Σ_j w_j·A_j·[1, v_j/σ] ≈ m·[1, o/σ], where m is the attention paid to
    the prefix. The Gram matrix is that of attention times 1 + v_i·v_j/σ². There are about 64 rounds; multiplicative updates
    refit the weights after each.
    """
    if len(k) > CANDIDATES:
        candidates = rms_attention(target, k, max(n, CANDIDATES), scale)
        return candidates[matching_pursuit(target, k[candidates], v[candidates], n, scale)] if n < CANDIDATES else candidates[:n]
    a, mass = _attention(target, k, scale), target.prefix_mass
    sigma2 = v.square().sum(-1).mean()
    gram = (a.T @ a).mul_(1 + v @ v.T / sigma2)
    goal = a.T @ mass + ((a * mass[:, None]).T @ target.o * v).sum(-1) / sigma2
    norm2 = gram.diagonal().clamp(min=1e-12)
    chosen, w = torch.empty(0, dtype=torch.long, device=k.device), goal.new_empty(0)
    left, free = goal.clone(), torch.ones(len(k), dtype=torch.bool, device=k.device)
    step = max(1, n // 64)
    while len(chosen) < n:
        gain = torch.where(free, left.clamp(min=0).square() / norm2, -1.0)
        new = gain.topk(min(step, n - len(chosen))).indices
        free[new] = False
        w = torch.cat((w, (left[new] / norm2[new]).clamp(min=1e-6) / len(new)))
        chosen = torch.cat((chosen, new))
        rows = gram[chosen]
        gram_chosen = rows[:, chosen]
        for _ in range(10):
            w = w * (goal[chosen] / (gram_chosen @ w).clamp(min=1e-12)).clamp(0.1, 10)
        left = goal - w @ rows
    return chosen


def fit_anchors(target: Target, k: torch.Tensor, v: torch.Tensor, scale: float) -> HeadEntries:
    """Biases and values for chosen keys k [n, d_k] with values v [n, d_v], in closed form and float64.

    Weights w ≥ 0 with A·w ≈ 1 give the mass, bias = log w. Ridge regression of the states' o gives the values, pulled
    towards the original ones.
    """
    mass = target.prefix_mass.double()[:, None]
    a = (scale * (target.q @ k.T) - target.lse[:, None]).exp().double()
    b = a * mass
    gram, goal = b.T @ b, (b.T @ mass)[:, 0]
    w = goal.new_full((len(k),), float(goal.sum() / gram.sum()))
    for _ in range(200):
        w = w * (goal / (gram @ w + 1e-12)).clamp(0, 10)
    w = w.clamp(1e-6, 1e8)
    p = a * w
    p = p / p.sum(-1, keepdim=True)
    b = p * mass
    gram = b.T @ b
    gram.diagonal().add_(1e-3 * gram.diagonal().mean() + 1e-12)
    change = torch.cholesky_solve(b.T @ ((target.o - p @ v.double()) * mass), torch.linalg.cholesky(gram))
    return HeadEntries(k, w.log().float(), (v + change).float())


def tune(anchors: HeadEntries, target: Target, scale: float, steps: int, generator: torch.Generator) -> HeadEntries:
    """Anchors with keys, biases and values moved by Adam (arXiv 1412.6980) to a smaller squared error of the output."""
    start = (anchors.key, anchors.bias, anchors.value)
    size = (anchors.key.std(), torch.tensor(1.0), anchors.value.std())
    moves = [torch.zeros_like(x, requires_grad=True) for x in start]
    goal = target.output()
    unit = goal.var(0).sum().clamp(min=1e-12)
    optimizer = torch.optim.Adam(moves, lr=min(0.1, LEARNING_RATE / math.sqrt(len(anchors.key))), betas=(0.9, 0.98))
    warm_up = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warm_up) * (0.51 + 0.49 * math.cos(math.pi * i / max(1, steps)))
    )
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(target), (min(BATCH, len(target)),), generator=generator).to(anchors.key.device)
            now = HeadEntries(*(x + s * move for x, s, move in zip(start, size, moves)))
            part = target[rows]
            output, _ = merge(anchor_state(now, part.q, scale), (part.live_o, part.live_lse))
            loss = (output - goal[rows]).square().sum(-1).mean() / unit
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return HeadEntries(*((x + s * move).detach() for x, s, move in zip(start, size, moves)))


def _attention(target: Target, k: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention [n, P] of the queries to the prefix keys, as a part of their attention to prefix and live tokens."""
    return (scale * (target.q @ k.T) - target.lse[:, None]).exp_() * target.prefix_mass[:, None]
