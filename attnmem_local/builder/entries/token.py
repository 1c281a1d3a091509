"""Exact heads of long prefixes: all keys and values, of which a query attends those with the largest logits.

For a retrieval head a few tokens matter for each query, but which ones no small set can say. The rest, which is broad
and smooth, is left to fitted anchors. They are searched over links made from queries, see token_graph.py.
"""

import torch

from ..state import State, merge, state_of_logits
from .target import Target

TOP_K = 64
REST = 64  # anchors for what is not among the top k
LONG = 4096  # tokens from which on a search is cheaper than attending all


def looked_up(n_tokens: int) -> bool:
    """Whether the exact heads of a segment of so many tokens are looked up rather than attended."""
    return n_tokens > LONG


def rest_target(target: Target, k: torch.Tensor, v: torch.Tensor, scale: float, block: int = 512) -> Target:
    """What is left to anchors: the state over all keys but the top k of each query; those count as live."""
    parts = []
    for rows in torch.arange(len(target), device=k.device).split(block):
        part = target[rows]
        logits = scale * (part.q @ k.T)
        top = logits.topk(min(TOP_K, len(k)))
        own = _state(top.values, v[top.indices])
        rest = state_of_logits(logits.scatter(-1, top.indices, -torch.inf), v)
        parts.append(Target(part.q, *rest, *merge(own, (part.live_o, part.live_lse))))
    return Target(*(torch.cat(x) for x in zip(*(vars(part).values() for part in parts))))


def _state(logits: torch.Tensor, v: torch.Tensor) -> State:
    """State of each query over its own values v [n, top_k, d_v]."""
    o, lse = state_of_logits(logits[:, None], v)
    return o[:, 0], lse[:, 0]
