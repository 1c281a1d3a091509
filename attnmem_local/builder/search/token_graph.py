"""Links between the keys of exact heads, over which the search for the largest logits walks.

Queries are not distributed like keys, so neighbours among the keys lead nowhere. Neighbours here are keys that the same
queries retrieve, as in RoarGraph (arXiv 2408.08933) and RetrievalAttention (arXiv 2409.10516). What share of the mass of the
true top k the search covers on a real head is in tests/test_fit.py.
"""

import numpy as np

from ...memory.entries import Graph

LINKS = 16  # per key
LINK_BYTES = 4 * LINKS + 4  # of a key: its links, and the row of `upper`
QUERIES = 4096  # that the links are made from
RETRIEVED = 128  # keys per query; as many as the search keeps
POOL = 128  # nearest keys that links are chosen from


def token_graph(keys: list[np.ndarray], queries: list[np.ndarray]) -> Graph:
    """One graph per KV head, all on level 0, for keys float32 [n, d_k] and queries like the live ones [n_q, d_k]."""
    parts = [_head_graph(k, q) for k, q in zip(keys, queries)]
    link0 = np.concatenate([link for link, _ in parts])
    return Graph(
        link0=link0,
        link=np.full((1, 1), -1, dtype=np.int32),  # a GGUF tensor cannot be empty
        upper=np.zeros(len(link0) + 1, dtype=np.int32),
        entry=np.array([entry for _, entry in parts], dtype=np.int32),
    )


def _head_graph(keys: np.ndarray, queries: np.ndarray) -> tuple[np.ndarray, int]:
    """link0 [n, LINKS] of one head, and the key that most queries retrieve, where the search begins."""
    n = len(keys)
    if n == 0:
        return np.empty((0, LINKS), np.int32), 0
    found = _retrieved(keys, queries[:: -(-len(queries) // QUERIES)])
    near, similarity = _nearest(found, n)
    link0 = _diverse(near, similarity)
    entry = int(np.bincount(found.ravel(), minlength=n).argmax())
    _connect(link0, keys, entry)
    return link0, entry


def _retrieved(keys: np.ndarray, queries: np.ndarray, block: int = 512) -> np.ndarray:
    """The keys with the largest logits of each query: [n_q, RETRIEVED]."""
    top = min(RETRIEVED, len(keys))
    blocks = (queries[i : i + block] @ keys.T for i in range(0, len(queries), block))
    return np.concatenate([np.argpartition(logits, -top, axis=1)[:, -top:] for logits in blocks])


def _nearest(found: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The keys that share most queries with each, best first, −1 fills up: ids and similarity [n, POOL].

    Similar is the cosine between the sets of queries that retrieve either: without the norm, keys that all queries
    retrieve would take all links, and the rest could not be reached.
    """
    pool = min(POOL, n)
    count = np.bincount(found.ravel(), minlength=n)
    query = np.argsort(found.ravel(), kind="stable") // found.shape[1]  # those of key 0, of key 1, ...
    near, similarity = np.full((n, pool), -1), np.zeros((n, pool), np.float32)
    for i, own in enumerate(np.split(query, np.cumsum(count)[:-1])):
        cosine = np.bincount(found[own].ravel(), minlength=n) / np.sqrt(np.maximum(1, count) * max(1, len(own)))
        cosine[i] = 0
        best = np.flatnonzero(cosine)
        best = best[np.argsort(-cosine[best], kind="stable")[:pool]]
        near[i, : len(best)], similarity[i, : len(best)] = best, cosine[best]
    return near, similarity


def _diverse(near: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """Links [n, LINKS]: of the nearest keys those to which no link chosen before leads already, as in HNSW.

    One place is left empty, for _connect.
    """
    link0 = np.full((len(near), LINKS), -1, np.int32)
    place = np.full(len(near) + 1, -1)  # of a key among the candidates; the last is that of no key
    for i, own in enumerate(similarity):
        candidates = near[i][near[i] >= 0]
        place[candidates] = np.arange(len(candidates))
        free = np.ones(len(candidates), dtype=bool)
        chosen = []
        while free.any() and len(chosen) < LINKS - 1:
            best = int(free.argmax())
            free[best] = False
            chosen.append(candidates[best])
            at = place[near[candidates[best]]]
            led = at[(at >= 0) & (similarity[candidates[best]] > own[at])]
            free[led] = False
        link0[i, : len(chosen)] = chosen
        place[candidates] = -1
    return link0


def _connect(link0: np.ndarray, keys: np.ndarray, entry: int) -> None:
    """Link the keys that the search could not reach, such as those that no query retrieves, in place."""
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
