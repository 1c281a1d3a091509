"""Entries: what a memory holds for the KV heads of one layer. docs/memory-format.md says what a query takes from each kind."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Kind(NamedTuple):
    """A kind of entries; what its queries take from them is written down in docs/memory-format.md."""

    name: str  # in tensor names, and the field of LayerMemory
    has_lse: bool
    is_searched: bool  # may have lists and a graph


KINDS = (
    Kind("centroid", has_lse=True, is_searched=True),
    Kind("tangent", has_lse=False, is_searched=True),
    Kind("residual", has_lse=True, is_searched=True),
    Kind("token", has_lse=False, is_searched=True),
    Kind("anchor", has_lse=False, is_searched=False),
)


@dataclass
class Graph:
    """A HNSW graph over the entries of one kind in one segment of one layer; ids are local to their head, -1 fills up."""

    link0: np.ndarray  # [n, m0] int32, neighbours on level 0
    link: np.ndarray  # [n_upper, m] int32, neighbours above
    upper: np.ndarray  # [n + 1] int32, entry i has the rows upper[i]:upper[i + 1] of link, level 1 first
    entry: np.ndarray  # [n_head_kv] int32, where the search of a head begins


@dataclass
class Lists:
    """The entries of one kind in one segment of one layer as lists of neighbours, none of them empty."""

    key: np.ndarray  # table of d_k, as in Entries
    bias: np.ndarray  # [n_list] float32: a search takes the lists with the largest key·q + bias
    offset: np.ndarray  # [n_list + 1] int32, list i owns the entries offset[i]:offset[i + 1]
    head: np.ndarray  # [n_head_kv + 1] int32, head h owns the lists head[h]:head[h + 1]


@dataclass
class Entries:
    """The entries of one kind in one segment of one layer; the KV heads lie one after another.

    A table of keys or values is float16 or float32 [n, d], or Q8_0 as uint8 [n, d / 32 * 34]: see rows().
    """

    key: np.ndarray  # table of d_k, after RoPE, in GGUF order
    bias: np.ndarray  # [n] float32: lookup score key·q + bias, or logit scale·key·q + bias of tokens and anchors
    value: np.ndarray  # table of d_v
    offset: np.ndarray  # [n_head_kv + 1] int32, head h owns the entries offset[h]:offset[h + 1]
    lse: np.ndarray | None = None  # [n] float32, natural log, scale included; centroids and residuals
    lists: Lists | None = None  # not for anchors, nor is a graph
    graph: Graph | None = None

    def head(self, h: int) -> slice:
        return slice(int(self.offset[h]), int(self.offset[h + 1]))


@dataclass
class LayerMemory:
    """What one segment holds for one layer; a KV head may have entries of any of these kinds."""

    centroid: Entries | None = None
    tangent: Entries | None = None
    residual: Entries | None = None  # only for heads that have anchors
    token: Entries | None = None
    anchor: Entries | None = None


def reordered(entries: Entries, heads: list[np.ndarray]) -> Entries:
    """The entries of each head in another order; without lists and graph, which hold for one order."""
    order = np.concatenate([own + first for own, first in zip(heads, entries.offset)])
    return Entries(
        key=entries.key[order],
        bias=entries.bias[order],
        value=entries.value[order],
        offset=entries.offset,
        lse=None if entries.lse is None else entries.lse[order],
    )
