"""Nearest centroid: Context Memorization for Efficient Long Context Generation, arXiv 2605.18226.

Queries of a KV head are clustered; an entry keeps its centroid and an attention state of the prefix. The entry
nearest to the live query gives its state. Both metrics are one search, the largest score key·q + bias:
    l2      key = c,      bias = −|c|²/2     (argmin |q − c|²)
    cosine  key = c/|c|,  bias = 0           (argmax cos(q, c); the length of q does not matter)
"""

from typing import Literal

import torch

from ..state import State
from .head import HeadEntries, round_to_half

Metric = Literal["l2", "cosine"]
EntryState = Literal["exact", "mean"]  # the state at the centroid, or mean_state as in the paper

ITERATIONS = 4  # of Lloyd's algorithm, which takes most of the time of a build with many entries


def cluster(q: torch.Tensor, n: int, metric: Metric, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """k-means from a random subset of q [n_q, d_k]: centroids [≤ n, d_k], mean q of each, and the cluster of each q."""
    points = torch.nn.functional.normalize(q, dim=-1) if metric == "cosine" else q
    centers = points[torch.randperm(len(q), generator=generator)[:n].sort().values.to(q.device)]
    for _ in range(ITERATIONS):
        nearest, distance = _assign(points, centers)
        centers, count = _means(points, nearest, len(centers))
        empty = (count == 0).nonzero().flatten()
        centers[empty] = points[distance.topk(len(empty)).indices]  # an empty cluster restarts at a point far from all
        if metric == "cosine":
            centers = torch.nn.functional.normalize(centers, dim=-1)
    nearest, _ = _assign(points, centers)
    _, nearest = nearest.unique(return_inverse=True)  # drop clusters that stayed empty
    centroid, _ = _means(q, nearest, int(nearest.max()) + 1)
    return centroid, nearest


def mean_state(o: torch.Tensor, lse: torch.Tensor, group: torch.Tensor) -> State:
    """The paper's state of a cluster: Z = exp(lse) is the mean over its queries, o the Z-weighted mean.

    o [n_q, d_v], lse [n_q], group [n_q] with the cluster of each query, none of them empty.
    """
    n = int(group.max()) + 1
    top = lse.new_full((n,), -torch.inf).scatter_reduce_(0, group, lse, "amax")
    z = (lse - top[group]).exp()
    z_sum = z.new_zeros(n).index_add_(0, group, z)
    o_sum = o.new_zeros(n, o.shape[1]).index_add_(0, group, z[:, None] * o)
    return o_sum / z_sum[:, None], top + (z_sum / torch.bincount(group)).log()


def centroid_entries(centroid: torch.Tensor, state: State, metric: Metric) -> HeadEntries:
    """Entries of centroids [n, d_k] with the states (o [n, d_v], lse [n])."""
    if metric == "cosine":
        key = round_to_half(torch.nn.functional.normalize(centroid, dim=-1))
        return HeadEntries(key, key.new_zeros(len(key)), *state, place=key)
    key = round_to_half(centroid)
    return HeadEntries(key, -key.square().sum(-1) / 2, *state, place=key)


def _assign(points: torch.Tensor, centers: torch.Tensor, block: int = 1024) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest center of each point, and the squared distance. Small blocks keep the scores in the cache."""
    half_norm, transposed = centers.square().sum(-1) / 2, centers.T.contiguous()
    nearest = torch.cat([torch.addmm(-half_norm, part, transposed).argmax(-1) for part in points.split(block)])
    return nearest, (points - centers[nearest]).square().sum(-1)


def _means(x: torch.Tensor, group: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of x [n_x, d] per group, and the size of each; zeros where a group is empty."""
    count = torch.bincount(group, minlength=n)
    return x.new_zeros(n, x.shape[1]).index_add_(0, group, x) / count.clamp(min=1)[:, None], count
