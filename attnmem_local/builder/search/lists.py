"""Lists of neighbouring entries: a search takes the lists nearest to the query, and scans their entries.

The inverted file of Jégou, Douze and Schmid, Product Quantization for Nearest Neighbor Search (2011), section IV. The
entries of a list lie one after another in the table, so that many are read at once, as a GPU wants it.
"""

import numpy as np
import torch

from ...memory.entries import Lists
from ...memory.tables import quantize_rows, rows
from ..entries.centroid import cluster


def n_lists(n: int) -> int:
    """How many lists the n entries of a head are kept in."""
    return round(2 * n**0.5)


def build_lists(heads: list[np.ndarray], seed: int) -> tuple[Lists, list[np.ndarray]]:
    """Lists over vectors float32 [n, d_k] in GGUF order, one for each entry, and the order that each head's entries are to have.

    A list is scored by the distance of the query to the mean of its vectors, whatever the score of an entry is, so the
    vectors are the queries that the entries are for.
    """
    parts = [_head_lists(vectors, seed) for vectors in heads]
    key = np.concatenate([mean for mean, _, _ in parts])
    key = quantize_rows(key) if key.shape[1] % 32 == 0 else key.astype(np.float16)
    lists = Lists(
        key=key,
        bias=-np.square(rows(key)).sum(-1) / 2,
        offset=np.cumsum([0, *np.concatenate([size for _, size, _ in parts])], dtype=np.int32),
        head=np.cumsum([0, *(len(size) for _, size, _ in parts)], dtype=np.int32),
    )
    return lists, [order for _, _, order in parts]


def _head_lists(vectors: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and size of each list, and the entries list by list."""
    if len(vectors) == 0:
        return np.empty(vectors.shape, np.float32), np.empty(0, np.int64), np.empty(0, np.int64)
    mean, group = cluster(torch.from_numpy(vectors), n_lists(len(vectors)), "l2", torch.Generator().manual_seed(seed))
    return mean.numpy(), np.bincount(group.numpy()), np.argsort(group.numpy(), kind="stable")
