"""The most probable of some labels, found exactly by best-first search over their tokens; needs numpy only."""

import heapq
from collections.abc import Callable, Sequence

import numpy as np

Tokens = Sequence[int]


def most_probable(labels: list[tuple[int, ...]], live: Tokens, log_probs: Callable[[Tokens, int, bool], np.ndarray]) -> int:
    """Index of the label with the highest log-probability, the sum over all its tokens, after live text.

    labels: tokens of each; none of them begins another.
    log_probs(tokens, n_past, last): float [n_tokens, n_vocab], what follows each of the tokens when they come after
    n_past tokens of the live text and of a label, or of the last token only.

    The log-probability of the first tokens of a label bounds that of the label, so the first whole label that comes out
    of the queue is the best one. Where the labels part clearly, that costs the live text and one or two short runs.
    """
    first = log_probs(live, 0, True)
    queue = [(0.0, (), False)]  # cost so far, tokens, whether that is a whole label
    while True:
        cost, path, whole = heapq.heappop(queue)
        if whole:
            return labels.index(path)
        path, following = _extend(labels, path)
        rows = np.concatenate((first, log_probs(path, len(live), False))) if path else first
        cost = -sum(float(rows[i, token]) for i, token in enumerate(path))
        if not following:
            heapq.heappush(queue, (cost, path, True))
        for token in following:
            heapq.heappush(queue, (cost - float(rows[-1, token]), (*path, token), False))


def _extend(labels, path: tuple[int, ...]) -> tuple[tuple[int, ...], list[int]]:
    """The path up to where its labels part or end, and the tokens that may follow it."""
    while True:
        following = sorted({label[len(path)] for label in labels if label[: len(path)] == path and len(label) > len(path)})
        if len(following) != 1:
            return path, following
        path = (*path, *following)
