"""Both searches over one table of looked-up entries: lists and an HNSW graph."""

import os
from dataclasses import replace

import numpy as np

from ...memory.entries import Entries, reordered
from .hnsw import build_graph, graph_bytes
from .lists import build_lists, list_bytes


def searchable(entries: Entries, centers: list[np.ndarray], seed: int) -> Entries:
    """Entries, reordered list by list, with their lists and graph.

    centers: the query float32 [n, d_k] that each entry was made for, one array per KV head, in GGUF order.
    """
    lists, order = build_lists(centers, seed)
    entries = reordered(entries, order)
    graph = build_graph([center[rows] for center, rows in zip(centers, order)], seed, threads=os.cpu_count() or 1)
    return replace(entries, lists=lists, graph=graph)


def index_bytes(n: int, d_k: int) -> int:
    """The expected bytes of lists and graph over n entries of one KV head, whose keys have d_k values."""
    return list_bytes(n, d_k) + graph_bytes(n)
