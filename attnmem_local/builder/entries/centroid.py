"""Centroids: Context Memorization for Efficient Long Context Generation, arXiv 2605.18226.

The queries of a KV head are clustered. An entry keeps the centroid c of a cluster and the attention state of the prefix for
it; a live query takes the state of the nearest entry. The nearest is that with the largest score key·q + bias, where
key = c and bias = −|c|²/2.
"""

import torch

from ..search.kmeans import cluster
from ..state import State
from .head import HeadEntries, round_to_half
from .kind import Head, NearestCenter


class Centroid(NearestCenter):
    name = "centroid"
    corrects: str | None = None

    def fit(self, head: Head, n: int) -> HeadEntries:
        center, group = cluster(head.target.q, n, head.generator)
        return center_entries(center, mean_state(head.target.o, head.target.lse, group))


def mean_state(o: torch.Tensor, lse: torch.Tensor, group: torch.Tensor) -> State:
    """The paper's state of a cluster: Z = exp(lse) is the mean over its queries, o the Z-weighted mean.

    o [n_q, d_v], lse [n_q], group [n_q] with the cluster of each query. No cluster is empty.
    """
    n = int(group.max()) + 1
    top = lse.new_full((n,), -torch.inf).scatter_reduce_(0, group, lse, "amax")
    z = (lse - top[group]).exp()
    z_sum = z.new_zeros(n).index_add_(0, group, z)
    o_sum = o.new_zeros(n, o.shape[1]).index_add_(0, group, z[:, None] * o)
    return o_sum / z_sum[:, None], top + (z_sum / torch.bincount(group)).log()


def center_entries(center: torch.Tensor, state: State) -> HeadEntries:
    """Entries at centers [n, d_k] with the states (o [n, d_v], lse [n])."""
    key = round_to_half(center)
    return HeadEntries(key, -key.square().sum(-1) / 2, *state, center=key)
