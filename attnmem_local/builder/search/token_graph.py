"""Links between the keys of exact heads, which the search for the largest logits walks.

Queries are not distributed like keys, so a walk between keys that are near each other leads nowhere. Keys are linked here
if the same queries retrieve them, as in RoarGraph (arXiv 2408.08933) and RetrievalAttention (arXiv 2409.10516).
tests/test_retrieved.py measures how much of the attention mass of the true top k the search covers on a real head.
"""

import numpy as np

from ...memory.entries import Graph

LINKS = 16  # links per key
LINK_BYTES = 4 * LINKS + 4  # bytes per key: its links and its row of `upper`
QUERIES = 4096  # queries that the links are made from
RETRIEVED = 128  # keys per query, as many as the search keeps
POOL = 128  # candidates for the links of a key


def token_graph(keys: list[np.ndarray], queries: list[np.ndarray]) -> Graph:
    """One graph per KV head, all on level 0, for keys float32 [n, d_k] and realistic queries float32 [n_q, d_k]."""
    parts = [_head_graph(k, q) for k, q in zip(keys, queries)]
    link0 = np.concatenate([link for link, _ in parts])
    return Graph(
        link0=link0,
        link=np.full((1, 1), -1, dtype=np.int32),  # a GGUF tensor cannot be empty
        upper=np.zeros(len(link0) + 1, dtype=np.int32),
        entry=np.array([entry for _, entry in parts], dtype=np.int32),
    )


def _head_graph(keys: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, int]:
    """link0 [n, LINKS] of one head, and the key that the search begins at: the one that most queries retrieve."""
    n = len(keys)
    if n == 0:
        return np.empty((0, LINKS), np.int32), 0
    retrieved = _retrieved(keys, queries[:: -(-len(queries) // QUERIES)])
    near, similarity = _nearest(retrieved, n)
    link0 = _diverse(near, similarity)
    entry = int(np.bincount(retrieved.ravel(), minlength=n).argmax())
    _connect(link0, keys, entry)
    return link0, entry


def _retrieved(keys: np.ndarray, queries: np.ndarray, block: int = 512) -> np.ndarray:
    """The keys with the largest logits of each query: int64 [n_q, RETRIEVED]."""
    top = min(RETRIEVED, len(keys))
    blocks = (queries[i : i + block] @ keys.T for i in range(0, len(queries), block))
    return np.concatenate([np.argpartition(logits, -top, axis=1)[:, -top:] for logits in blocks])


def _nearest(retrieved: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """For each key the keys that share most queries with it, best first: ids and similarity [n, POOL], padded with −1.

    The similarity of two keys is the cosine between the sets of queries that retrieve them. Without the norm, keys that
    all queries retrieve would take all links, and the others could not be reached.
    """
    pool = min(POOL, n)
    count = np.bincount(retrieved.ravel(), minlength=n)
    query = np.argsort(retrieved.ravel(), kind="stable") // retrieved.shape[1]  # the queries of key 0, then of key 1, ...
    near, similarity = np.full((n, pool), -1), np.zeros((n, pool), np.float32)
    for i, queries in enumerate(np.split(query, np.cumsum(count)[:-1])):
        cosine = np.bincount(retrieved[queries].ravel(), minlength=n) / np.sqrt(np.maximum(1, count) * max(1, len(queries)))
        cosine[i] = 0
        best = np.flatnonzero(cosine)
        best = best[np.argsort(-cosine[best], kind="stable")[:pool]]
        near[i, : len(best)], similarity[i, : len(best)] = best, cosine[best]
    return near, similarity


def _diverse(near: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """Links [n, LINKS] to the nearest keys that no link chosen before leads to, as HNSW prunes its links.

    One link of each key stays empty for _connect.
    """
    link0 = np.full((len(near), LINKS), -1, np.int32)
    position = np.full(len(near) + 1, -1)  # of each key among the candidates; the last element stands for the padding −1
    for i, similar in enumerate(similarity):
        candidates = near[i][near[i] >= 0]
        position[candidates] = np.arange(len(candidates))
        free = np.ones(len(candidates), dtype=bool)
        chosen: list[int] = []
        while free.any() and len(chosen) < LINKS - 1:
            best = int(free.argmax())
            free[best] = False
            chosen.append(candidates[best])
            there = position[near[candidates[best]]]
            reached = there[(there >= 0) & (similarity[candidates[best]] > similar[there])]
            free[reached] = False
        link0[i, : len(chosen)] = chosen
        position[candidates] = -1
    return link0


def _connect(link0: np.ndarray, keys: np.ndarray, entry: int) -> None:
    """Link, in place, the keys that the search could not reach, such as those that no query retrieves."""
    reached = np.zeros(len(keys), dtype=bool)
    used = (link0 >= 0).sum(1)

    def reach(key: int) -> None:
        border = np.array([key])
        while len(border):
            reached[border] = True
            border = np.unique(link0[border])
            border = border[(border >= 0) & ~reached[border]]

    reach(entry)
    for i in range(len(keys)):
        if not reached[i]:
            near = np.flatnonzero(reached & (used < LINKS))
            near = near[np.square(keys[near] - keys[i]).sum(1).argmin()]
            link0[near, used[near]] = i
            used[near] += 1
            if used[i] == 0:
                link0[i, 0] = near
                used[i] = 1
            reach(i)
