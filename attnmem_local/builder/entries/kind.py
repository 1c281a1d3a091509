"""The interface of an entry kind, and the KV head that it is fitted to."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from ...memory.entries import Entries
from ...memory.memory import Memory
from ...memory.spec import ModelSpec
from ..search.index import index_bytes, searchable
from ..state import State
from .head import HeadEntries, pair_bytes
from .target import Target

if TYPE_CHECKING:
    from ..job import Build


@dataclass
class Head:
    """One KV head of one segment while its kinds of entries are fitted, one after another."""

    k: torch.Tensor  # [n_tokens, d_k], in the order of transformers
    v: torch.Tensor  # [n_tokens, d_v]
    scale: float  # of the attention logits
    target: Target  # what is left to reproduce, for the queries of this head
    tune_steps: int
    generator: torch.Generator
    fitted: dict[str, HeadEntries] = field(default_factory=dict)  # by the name of the kind


class EntryKind(Protocol):
    """How entries of one kind are fitted, what a query takes from them, and how the runtime searches them."""

    name: str  # as in memory/entries.py
    corrects: str | None  # the kind whose state this one is added to; None for a state of its own

    def fit(self, head: Head, n: int) -> HeadEntries:
        """At most n entries that reproduce head.target. A kind that serves part of it leaves the rest in head.target."""

    def state(self, entries: HeadEntries, q: torch.Tensor, memory: Memory) -> State:
        """What queries q [..., d_k] take from the entries of one KV head: o [..., d_v], lse [...]. The search is exact."""

    def index(self, entries: Entries, heads: list[HeadEntries], target: Target, build: "Build") -> Entries:
        """The entries of a layer together with the structures that the runtime searches them by."""

    def nbytes(self, spec: ModelSpec, n: int, eight_bit: bool) -> int:
        """Bytes of n entries of one KV head in the memory file, with their search structures. eight_bit: Q8_0 tables."""


class NearestCenter:
    """What kinds share whose entries belong to clusters of queries: the entry nearest to the query is looked up."""

    def state(self, entries: HeadEntries, q: torch.Tensor, memory: Memory) -> State:
        assert entries.lse is not None
        best = (q @ entries.key.T + entries.bias).argmax(-1)
        return entries.value[best], entries.lse[best]

    def index(self, entries: Entries, heads: list[HeadEntries], target: Target, build: "Build") -> Entries:
        return searchable(entries, [build.model.to_gguf_order(head.searched_by()).cpu().numpy() for head in heads], build.seed)

    def nbytes(self, spec: ModelSpec, n: int, eight_bit: bool) -> int:
        return n * (pair_bytes(spec, eight_bit) + 8) + index_bytes(n, spec.key_length)  # 8: bias and log-sum-exp
