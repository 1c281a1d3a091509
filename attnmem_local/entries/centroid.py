"""Nearest centroid: Context Memorization for Efficient Long Context Generation, arXiv 2605.18226.

Queries of a KV head are clustered; an entry keeps its centroid and an attention state of the prefix. The entry
nearest to the live query gives its state. Both metrics are one search, the largest score key·q + bias:
    l2      key = c,      bias = −|c|²/2     (argmin |q − c|²)
    cosine  key = c/|c|,  bias = 0           (argmax cos(q, c); the length of q does not matter)
"""

from typing import Callable, Literal

import torch

from ..state import State
from .head import HeadEntries, round_to_half

Metric = Literal["l2", "cosine"]
STATES = ("exact", "mean")


def fit_centroids(
    q: torch.Tensor,
    n: int,
    state_of: Callable[[torch.Tensor], State],
    metric: Metric = "l2",
    state: Literal["exact", "mean"] = "exact",
    iterations: int = 12,
    generator: torch.Generator | None = None,
) -> HeadEntries:
    """Cluster the queries q [n_q, d_k] of one KV head into at most n entries.

    state_of(q) gives the exact state of the prefix for queries [n_q, d_k].
    state: what an entry stores: "exact", the state at the centroid, or "mean", as in the paper, the mean of
    Z = exp(lse) and the Z-weighted mean of o over the queries of the cluster.
    """
    centroid, nearest = kmeans(q, n, metric, iterations, generator)
    if metric == "cosine":
        key = round_to_half(torch.nn.functional.normalize(centroid, dim=-1))
        bias = key.new_zeros(len(key))
    else:
        centroid = key = round_to_half(centroid)
        bias = -key.square().sum(-1) / 2
    o, lse = state_of(centroid) if state == "exact" else _mean_state(*state_of(q), nearest, len(centroid))
    return HeadEntries(key, bias, o, lse)


def kmeans(
    q: torch.Tensor, n: int, metric: Metric, iterations: int, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm from a random subset. Returns centroids [≤ n, d_k], mean q of each, and the cluster of each q."""
    points = torch.nn.functional.normalize(q, dim=-1) if metric == "cosine" else q
    seeds = torch.randperm(len(q), generator=generator)[:n].sort().values.to(q.device)
    centers = points[seeds]
    for _ in range(iterations):
        nearest, distance = _assign(points, centers)
        centers, count = _means(points, nearest, len(centers))
        empty = (count == 0).nonzero().flatten()
        centers[empty] = points[distance.topk(len(empty)).indices]  # an empty cluster restarts at a point far from all
        if metric == "cosine":
            centers = torch.nn.functional.normalize(centers, dim=-1)
    nearest, _ = _assign(points, centers)
    _, nearest = nearest.unique(return_inverse=True)  # drop clusters that stayed empty
    centroids, _ = _means(q, nearest, int(nearest.max()) + 1)
    return centroids, nearest


def _assign(points: torch.Tensor, centers: torch.Tensor, block: int = 16384) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest center of each point, and the squared distance up to |point|²."""
    half_norm = centers.square().sum(-1) / 2
    best = [(part @ centers.T - half_norm).max(-1) for part in points.split(block)]
    nearest, score = torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])
    return nearest, points.square().sum(-1) - 2 * score


def _means(x: torch.Tensor, group: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of x [n_x, d] per group, and the size of each; zeros where a group is empty."""
    count = torch.bincount(group, minlength=n)
    return x.new_zeros(n, x.shape[1]).index_add_(0, group, x) / count.clamp(min=1)[:, None], count


def _mean_state(o: torch.Tensor, lse: torch.Tensor, group: torch.Tensor, n: int) -> State:
    """Per group: log of the mean of Z = exp(lse), and the Z-weighted mean of o."""
    top = lse.new_full((n,), -torch.inf).scatter_reduce_(0, group, lse, "amax")
    z = (lse - top[group]).exp()
    count = torch.bincount(group, minlength=n)
    z_sum = z.new_zeros(n).index_add_(0, group, z)
    o_sum = o.new_zeros(n, o.shape[1]).index_add_(0, group, z[:, None] * o)
    return o_sum / z_sum[:, None], top + (z_sum / count).log()
