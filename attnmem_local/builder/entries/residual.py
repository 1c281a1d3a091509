"""Residuals: the error (Δo, Δlse) = true state − state of the anchors near a centroid.

The entry nearest to the live query corrects the state of the anchors. The bytes of a table improve quality, and a query
pays for one lookup, however many entries there are.
"""

import torch

from ..search.kmeans import cluster
from ..state import State
from .anchor import anchor_state
from .centroid import center_entries
from .head import HeadEntries
from .kind import Head, NearestCenter
from .target import Target


class Residual(NearestCenter):
    name = "residual"
    corrects: str | None = "anchor"

    def fit(self, head: Head, n: int) -> HeadEntries:
        center, group = cluster(head.target.q, n, head.generator)
        return residual_entries(center, group, head.target, anchor_state(head.fitted["anchor"], head.target.q, head.scale))


def residual_entries(center: torch.Tensor, group: torch.Tensor, target: Target, anchors: State) -> HeadEntries:
    """Entries at centers [n, d_k], from queries with clusters group [n_q] and the states that the anchors give them.

    Δ is the mean over the queries of a cluster, weighted by the square of the attention that they pay to the prefix. It is
    shrunk where few queries support it, as it is a guess for the next one.
    """
    weight = target.prefix_mass.square()
    total = weight.new_zeros(len(center)).index_add_(0, group, weight) + weight.mean()

    def mean(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(center), x.shape[1]).index_add_(0, group, weight[:, None] * x) / total[:, None]

    o, lse = anchors
    return center_entries(center, (mean(target.o - o), mean((target.lse - lse)[:, None])[:, 0]))
