"""HNSW graphs over entries, built with hnswlib and exported as plain arrays, which the runtime walks in place.

Malkov and Yashunin, Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small
World graphs, arXiv 1603.09320. hnswalg.h defines the memory layout that is read here.
"""

from concurrent.futures import ThreadPoolExecutor

import hnswlib
import numpy as np

from ...memory.entries import Graph

M = 16  # links per entry on each level above 0; level 0 has twice as many
EF_CONSTRUCTION = 128  # candidates that are kept while an entry is linked


def graph_bytes(n: int) -> int:
    """The expected bytes of a graph over n entries: links on level 0, a row number, and 1 / (M − 1) rows of links above."""
    return n * (4 * 2 * M + 4 + round(4 * M / (M - 1)))


def build_graph(heads: list[np.ndarray], seed: int, space: str = "l2", threads: int = 1) -> Graph:
    """One graph per KV head over vectors float32 [n, d], one vector for each entry, in the order of the entries.

    space: the distance that links neighbours, "l2" or "ip". A search always walks by the score key·q + bias, so the
    vectors need not be the keys: it is enough that neighbours serve similar queries.
    """
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda vectors: _head_graph(vectors, seed, space), heads))
    rows = np.cumsum([0, *(len(link) for _, link, _, _ in parts)])
    upper = [upper[:-1] + rows[h] for h, (_, _, upper, _) in enumerate(parts)]
    link = np.concatenate([link for _, link, _, _ in parts])
    return Graph(
        link0=np.concatenate([link0 for link0, _, _, _ in parts]),
        link=link if len(link) else np.full((1, M), -1, dtype=np.int32),  # a GGUF tensor cannot be empty
        upper=np.concatenate([*upper, rows[-1:]]).astype(np.int32),
        entry=np.array([entry for _, _, _, entry in parts], dtype=np.int32),
    )


def _head_graph(vectors: np.ndarray, seed: int, space: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """link0 [n, 2M], link [n_upper, M], upper [n + 1] and the entry point of one head."""
    n = len(vectors)
    if n == 0:
        return np.empty((0, 2 * M), np.int32), np.empty((0, M), np.int32), np.zeros(1, np.int64), 0
    index = hnswlib.Index(space, vectors.shape[1])
    index.init_index(n, M=M, ef_construction=EF_CONSTRUCTION, random_seed=seed)
    index.add_items(vectors, np.arange(n), num_threads=1)  # the graph depends on the order of insertion
    (state,) = index.__getstate__()

    level0 = np.asarray(state["data_level0"]).view(np.uint8)[: n * state["size_data_per_element"]].reshape(n, -1)
    label = level0[:, state["label_offset"] :][:, :8].copy().view(np.uint64)[:, 0].astype(np.int64)
    link0 = _links(level0[:, state["offset_level0"] :][:, : 4 * (2 * M + 1)].copy(), label)

    levels = np.asarray(state["element_levels"])[:n]
    raw = np.asarray(state["link_lists"]).view(np.uint8)[: levels.sum() * 4 * (M + 1)].reshape(-1, 4 * (M + 1))
    start = np.cumsum([0, *levels])
    link = _links(raw.copy(), label)

    # hnswlib numbers nodes by insertion, the file by entry
    order = np.argsort(label)
    rows = np.concatenate([np.arange(start[i], start[i + 1]) for i in order]).astype(np.int64)
    return link0[order], link[rows], np.cumsum([0, *levels[order]]), int(label[state["enterpoint_node"]])


def _links(raw: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Link lists as bytes [n, count and ids] to int32 ids of entries, −1 after the last."""
    ids = raw.view(np.uint32).astype(np.int64)
    count = ids[:, 0] & 0xFFFF  # the upper bytes hold hnswlib's deletion mark
    ids = ids[:, 1:]
    used = np.arange(ids.shape[1])[None] < count[:, None]
    return np.where(used, label[np.where(used, ids, 0)], -1).astype(np.int32)
