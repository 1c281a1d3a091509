"""Residual entries: what the anchors of a head are off by near a centroid, (Δo, Δlse) = true state − state of the anchors.

The entry nearest to the live query corrects the anchors' state, so that bytes buy quality at no more than a lookup.
"""

import torch

from ..state import State
from .centroid import centroid_entries
from .head import HeadEntries
from .target import Target


def residual_entries(centroid: torch.Tensor, group: torch.Tensor, target: Target, anchors: State) -> HeadEntries:
    """Entries of centroids [n, d_k] from queries whose cluster is group [n_q] and whose anchors give a state.

    Δ is the mean over the queries of a cluster, weighted by the squared share of attention that they pay to the prefix,
    and shrunk where few queries speak for it: it is a guess for the next one.
    """
    weight = target.share.square()
    total = weight.new_zeros(len(centroid)).index_add_(0, group, weight) + weight.mean()

    def mean(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(len(centroid), x.shape[1]).index_add_(0, group, weight[:, None] * x) / total[:, None]

    o, lse = anchors
    return centroid_entries(centroid, (mean(target.o - o), mean((target.lse - lse)[:, None])[:, 0]), "l2")
