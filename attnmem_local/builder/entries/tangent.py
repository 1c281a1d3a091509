"""Tangent entries: log-sum-exp is a convex function of the query, and every tangent of it is a lower bound.

At a centroid c the gradient of lse(q) is scale·k̄, with k̄ the attention-weighted mean key of the prefix. So
    lse(q) ≥ scale·k̄·q + b,   b = lse(c) − scale·k̄·c,
and the entry with the largest value, a maximum inner product search over [scale·k̄, b], is the best of the bounds. That
value is the log-sum-exp of the state that is looked up; its o is that at the centroid.
"""

import torch

from ..state import exact_state
from .head import HeadEntries, round_to_half


def tangent_entries(centroid: torch.Tensor, o: torch.Tensor, k: torch.Tensor, scale: float) -> HeadEntries:
    """Entries at centroids [n, d_k] with outputs o [n, d_v], for the prefix keys k [P, d_k]."""
    mean_key, lse = exact_state(centroid, k, k, scale)
    key = round_to_half(scale * mean_key)
    return HeadEntries(key, lse - (key * centroid).sum(-1), o, place=centroid)
