"""Tokens: exact heads of long prefixes. All keys and values are kept, and a query attends those with the largest logits.

A few tokens matter to each query of a retrieval head, but they differ from query to query, so no small set would do. The
rest of the attention, which is broad and smooth, is left to fitted anchors. token_graph.py links the keys for the search.
"""

from typing import TYPE_CHECKING

import torch

from ...memory.entries import Entries
from ...memory.memory import Memory
from ...memory.spec import ModelSpec
from ..search.token_graph import LINK_BYTES, token_graph
from ..state import State, merge, state_of_logits
from .anchor import exact_anchors
from .head import HeadEntries, pair_bytes
from .kind import Head
from .target import Target

if TYPE_CHECKING:
    from ..job import Build

TOP_K = 64  # tokens that a query attends
REST = 64  # anchors that stand for the tokens beyond the top k
LONG = 4096  # tokens of a segment from which on a search is cheaper than attending all


class Token:
    name = "token"
    corrects: str | None = None

    def fit(self, head: Head, n: int) -> HeadEntries:
        head.target = rest_target(head.target, head.k, head.v, head.scale)
        return exact_anchors(head.k, head.v)

    def state(self, entries: HeadEntries, q: torch.Tensor, memory: Memory) -> State:
        assert memory.token_top_k is not None
        logits = memory.model.scale * (q @ entries.key.T) + entries.bias
        top = logits.topk(min(memory.token_top_k, logits.shape[-1]))
        return state_of_logits(torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values), entries.value)

    def index(self, entries: Entries, heads: list[HeadEntries], target: Target, build: "Build") -> Entries:
        entries.graph = token_graph([head.key.cpu().numpy() for head in heads], list(target.q.cpu().numpy()))
        return entries

    def nbytes(self, spec: ModelSpec, n: int, eight_bit: bool) -> int:
        return n * (pair_bytes(spec, eight_bit) + 4 + LINK_BYTES)


def looked_up(n_tokens: int) -> bool:
    """Whether the exact heads of a segment of n_tokens tokens are looked up rather than attended."""
    return n_tokens > LONG


def rest_target(target: Target, k: torch.Tensor, v: torch.Tensor, scale: float, block: int = 512) -> Target:
    """What is left to anchors: the state over all keys but the top k of each query. The top k count as live."""
    parts = []
    for rows in torch.arange(len(target), device=k.device).split(block):
        part = target[rows]
        logits = scale * (part.q @ k.T)
        top = logits.topk(min(TOP_K, len(k)))
        attended = _state(top.values, v[top.indices])
        rest = state_of_logits(logits.scatter(-1, top.indices, -torch.inf), v)
        parts.append(Target(part.q, *rest, *merge(attended, (part.live_o, part.live_lse))))
    return Target(*(torch.cat(x) for x in zip(*(vars(part).values() for part in parts))))


def _state(logits: torch.Tensor, v: torch.Tensor) -> State:
    """The state of each query over values v [n, top_k, d_v] of its own."""
    o, lse = state_of_logits(logits[:, None], v)
    return o[:, 0], lse[:, 0]
