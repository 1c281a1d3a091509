"""Entries: the tables that a memory holds for the KV heads of one layer. docs/memory-format.md says how a query uses each kind."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Kind(NamedTuple):
    """A kind of entries."""

    name: str  # used in tensor names and as the field name in LayerMemory
    has_lse: bool  # each entry stores a log-sum-exp
    is_searched: bool  # a table of this kind may come with lists and a graph


KINDS = (
    Kind("centroid", has_lse=True, is_searched=True),
    Kind("tangent", has_lse=False, is_searched=True),
    Kind("residual", has_lse=True, is_searched=True),
    Kind("token", has_lse=False, is_searched=True),
    Kind("anchor", has_lse=False, is_searched=False),
)


@dataclass
class Graph:
    """An HNSW graph over the entries of one kind in one segment of one layer.

    Entry ids count from 0 within each head. Rows of neighbours are padded with -1.
    """

    link0: np.ndarray  # [n, m0] int32, neighbours on level 0
    link: np.ndarray  # [n_upper, m] int32, neighbours on higher levels
    upper: np.ndarray  # [n + 1] int32: rows upper[i]:upper[i + 1] of link belong to entry i, level 1 first
    entry: np.ndarray  # [n_head_kv] int32, the entry at which the search of each head starts


@dataclass
class Lists:
    """The entries of one kind in one segment of one layer, grouped into non-empty lists of neighbours."""

    key: np.ndarray  # table [n_list, d_k], stored as in Entries
    bias: np.ndarray  # [n_list] float32; a search visits the lists with the largest key·q + bias
    offset: np.ndarray  # [n_list + 1] int32: list i holds the entries offset[i]:offset[i + 1]
    head: np.ndarray  # [n_head_kv + 1] int32: head h has the lists head[h]:head[h + 1]


@dataclass
class Entries:
    """The entries of one kind in one segment of one layer, one KV head after another.

    A table of keys or values is float16 or float32 [n, d], or Q8_0 as uint8 [n, d / 32 * 34]; rows() decodes it.
    """

    key: np.ndarray  # table [n, d_k], after RoPE, in GGUF order
    bias: np.ndarray  # [n] float32; tokens and anchors: logit scale·key·q + bias, other kinds: lookup score key·q + bias
    value: np.ndarray  # table [n, d_v]
    offset: np.ndarray  # [n_head_kv + 1] int32: head h has the entries offset[h]:offset[h + 1]
    lse: np.ndarray | None = None  # [n] float32, natural log, scale included; centroids and residuals only
    lists: Lists | None = None  # searched kinds only
    graph: Graph | None = None  # searched kinds only

    def head(self, h: int) -> slice:
        """The rows of KV head h."""
        return slice(int(self.offset[h]), int(self.offset[h + 1]))


@dataclass
class LayerMemory:
    """The entries of one segment in one layer; a KV head may combine any of these kinds."""

    centroid: Entries | None = None
    tangent: Entries | None = None
    residual: Entries | None = None  # for heads with anchors only
    token: Entries | None = None
    anchor: Entries | None = None


def reordered(entries: Entries, heads: list[np.ndarray]) -> Entries:
    """The same entries in another order, without lists and graph, which depend on the order.

    heads: for each KV head, int [n_h], the old ids within the head in their new order.
    """
    order = np.concatenate([ids + first for ids, first in zip(heads, entries.offset)])
    return Entries(
        key=entries.key[order],
        bias=entries.bias[order],
        value=entries.value[order],
        offset=entries.offset,
        lse=None if entries.lse is None else entries.lse[order],
    )
