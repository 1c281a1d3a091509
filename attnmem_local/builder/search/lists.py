"""Lists of neighbouring entries: a search takes the lists nearest to the query, and scans their entries.

The inverted file of Jégou, Douze and Schmid, Product Quantization for Nearest Neighbor Search (2011), section IV. The
entries of a list lie one after another in the table, so that a search reads many rows at once, as a GPU prefers.
"""

import numpy as np
import torch

from ...memory.entries import Lists
from ...memory.tables import fits_q8_0, quantize_rows, row_bytes, rows
from .kmeans import cluster


def n_lists(n: int) -> int:
    """The number of lists for the n entries of a KV head."""
    return round(2 * n**0.5)


def list_bytes(n: int, d_k: int) -> int:
    """Bytes of the lists of n entries: a mean, a bias and an offset each."""
    return n_lists(n) * (row_bytes(d_k, fits_q8_0(d_k)) + 8)


def build_lists(heads: list[np.ndarray], seed: int) -> tuple[Lists, list[np.ndarray]]:
    """Lists of the entries of each KV head, and the order int64 [n] that the entries of each head must be brought into.

    heads: the queries float32 [n, d_k] that the entries were made for, not their keys, in GGUF order. Lists are ranked by
    L2 distance from the query to the list's mean, whatever metric scores the entries.
    """
    parts = [_head_lists(vectors, seed) for vectors in heads]
    key = np.concatenate([mean for mean, _, _ in parts])
    key = quantize_rows(key) if fits_q8_0(key.shape[1]) else key.astype(np.float16)
    lists = Lists(
        key=key,
        bias=-np.square(rows(key)).sum(-1) / 2,
        offset=np.cumsum([0, *np.concatenate([size for _, size, _ in parts])], dtype=np.int32),
        head=np.cumsum([0, *(len(size) for _, size, _ in parts)], dtype=np.int32),
    )
    return lists, [order for _, _, order in parts]


def _head_lists(vectors: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean and size of each list of one head, and its entries list by list."""
    if len(vectors) == 0:
        return np.empty(vectors.shape, np.float32), np.empty(0, np.int64), np.empty(0, np.int64)
    mean, group = cluster(torch.from_numpy(vectors), n_lists(len(vectors)), torch.Generator().manual_seed(seed))
    return mean.numpy(), np.bincount(group.numpy()), np.argsort(group.numpy(), kind="stable")
