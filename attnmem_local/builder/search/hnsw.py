"""HNSW graphs over entries, built with hnswlib and exported as plain arrays that are walked in place.

Malkov and Yashunin, Efficient and robust approximate nearest neighbor search using Hierarchical Navigable Small
World graphs, arXiv 1603.09320. The layout of hnswlib's memory is that of hnswalg.h.
"""

from concurrent.futures import ThreadPoolExecutor

import hnswlib
import numpy as np

from ...memory.entries import Graph

M = 16  # links per entry above level 0; twice as many on level 0
EF_CONSTRUCTION = 128


def build_graph(heads: list[np.ndarray], seed: int, space: str = "l2", threads: int = 1) -> Graph:
    """One graph per KV head over vectors float32 [n, d], one for each entry in the order of the entries.

    space: "l2", which orders unit vectors by cosine too, or "ip". The walk is by the score key·q + bias in any case, so
    the vectors to link need not be the keys: neighbours only have to be entries of similar queries.
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
    """link0 [n, 2M], link [n_upper, M], upper [n + 1], entry of one head."""
    n = len(vectors)
    if n == 0:
        return np.empty((0, 2 * M), np.int32), np.empty((0, M), np.int32), np.zeros(1, np.int64), 0
    index = hnswlib.Index(space, vectors.shape[1])
    index.init_index(n, M=M, ef_construction=EF_CONSTRUCTION, random_seed=seed)
    index.add_items(vectors, np.arange(n), num_threads=1)  # one thread: the graph depends on the order of insertion
    (state,) = index.__getstate__()

    level0 = np.asarray(state["data_level0"]).view(np.uint8)[: n * state["size_data_per_element"]].reshape(n, -1)
    label = level0[:, state["label_offset"] :][:, :8].copy().view(np.uint64)[:, 0].astype(np.int64)
    link0 = _links(level0[:, state["offset_level0"] :][:, : 4 * (2 * M + 1)].copy(), label)

    levels = np.asarray(state["element_levels"])[:n]
    raw = np.asarray(state["link_lists"]).view(np.uint8)[: levels.sum() * 4 * (M + 1)].reshape(-1, 4 * (M + 1))
    start = np.cumsum([0, *levels])
    link = _links(raw.copy(), label)

    # hnswlib numbers by insertion, the file by entry
    order = np.argsort(label)
    rows = np.concatenate([np.arange(start[i], start[i + 1]) for i in order]).astype(np.int64)
    return link0[order], link[rows], np.cumsum([0, *levels[order]]), int(label[state["enterpoint_node"]])


def _links(raw: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Link lists [n, count and ids, as bytes] -> int32 ids of entries, −1 after the last."""
    ids = raw.view(np.uint32).astype(np.int64)
    count = ids[:, 0] & 0xFFFF  # the upper bytes hold hnswlib's deletion mark
    ids = ids[:, 1:]
    used = np.arange(ids.shape[1])[None] < count[:, None]
    return np.where(used, label[np.where(used, ids, 0)], -1).astype(np.int32)
