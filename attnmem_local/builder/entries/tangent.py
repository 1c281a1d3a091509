"""Tangents: the log-sum-exp is a convex function of the query, and every tangent of it is a lower bound.

At a center c the gradient of lse(q) is scale·k̄, with k̄ the attention-weighted mean key of the prefix. So
    lse(q) ≥ scale·k̄·q + b,   b = lse(c) − scale·k̄·c,
and the entry with the largest score, a maximum inner product search over [scale·k̄, b], is the best of the bounds. Its score
is the log-sum-exp of the state that a query takes; its value is the mean output of the cluster around c.
"""

import torch

from ...memory.memory import Memory
from ...memory.spec import ModelSpec
from ...memory.tables import row_bytes
from ..search.index import index_bytes
from ..search.kmeans import cluster
from ..state import State, exact_state
from .centroid import mean_state
from .head import HeadEntries, round_to_half
from .kind import Head, NearestCenter


class Tangent(NearestCenter):
    name = "tangent"
    corrects: str | None = None

    def fit(self, head: Head, n: int) -> HeadEntries:
        center, group = cluster(head.target.q, n, head.generator)
        return tangent_entries(center, mean_state(head.target.o, head.target.lse, group)[0], head.k, head.scale)

    def state(self, entries: HeadEntries, q: torch.Tensor, memory: Memory) -> State:
        best = (q @ entries.key.T + entries.bias).max(-1)
        return entries.value[best.indices], best.values

    def nbytes(self, spec: ModelSpec, n: int, eight_bit: bool) -> int:
        row = 2 * spec.key_length + row_bytes(spec.value_length, eight_bit) + 4  # keys stay float16, see join_heads
        return n * row + index_bytes(n, spec.key_length)


def tangent_entries(center: torch.Tensor, o: torch.Tensor, k: torch.Tensor, scale: float) -> HeadEntries:
    """Entries at centers [n, d_k] with outputs o [n, d_v], for the prefix keys k [P, d_k]."""
    mean_key, lse = exact_state(center, k, k, scale)
    key = round_to_half(scale * mean_key)
    return HeadEntries(key, lse - (key * center).sum(-1), o, center=center)
