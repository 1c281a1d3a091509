"""A PyTorch runtime of a memory: slow, plain, and the oracle of the tests."""

from typing import NamedTuple

import torch

from ..memory.entries import Entries
from ..memory.memory import Memory
from ..memory.tables import rows
from .capture import Live
from .model import BuildModel
from .state import State, merge, state_of_logits


class Table(NamedTuple):
    """The entries of one KV head in float32."""

    key: torch.Tensor  # [n, d_k]
    bias: torch.Tensor  # [n]
    value: torch.Tensor  # [n, d_v]
    lse: torch.Tensor | None  # [n]


Tables = dict[tuple, Table]  # by segment, layer, kind and KV head


def memory_state(memory: Memory, layer: int, q: torch.Tensor, tables: Tables | None = None) -> State:
    """State of all segments for queries q [..., n_head_kv, n_q, d_k] float32, in GGUF order; every search is exact.

    tables: those of this memory that were converted before; new ones are added.
    """
    tables = {} if tables is None else tables
    merged = []
    for h in range(memory.model.head_count_kv):
        q_h = q[..., h, :, :]
        state = q.new_zeros(*q_h.shape[:-1], memory.model.value_length), q.new_full(q_h.shape[:-1], -torch.inf)
        for s in range(len(memory.layers)):
            for other in _segment_states(memory, s, layer, h, q_h, tables):
                state = merge(state, other)
        merged.append(state)
    return torch.stack([o for o, _ in merged], dim=-3), torch.stack([lse for _, lse in merged], dim=-2)


def memory_session(model: BuildModel, memories: list[Memory]) -> Live:
    """A session whose past is these memories, for running live tokens in PyTorch."""
    tables: list[Tables] = [{} for _ in memories]

    def past(layer, q, scale):
        state = None
        for memory, converted in zip(memories, tables):
            other = memory_state(memory, layer, model.to_gguf_order(q), converted)
            state = other if state is None else merge(state, other)
        return state

    return Live(past)


def _segment_states(memory: Memory, s: int, layer: int, h: int, q: torch.Tensor, tables: Tables):
    """One state for each kind of entries that KV head h has in a segment."""
    if (found := memory.layers[s].get(layer)) is None:
        return

    def table(kind: str) -> Table | None:
        entries = getattr(found, kind)
        if entries is None or entries.offset[h] == entries.offset[h + 1]:
            return None
        key = (s, layer, kind, h)
        if key not in tables:
            tables[key] = _table(entries, h, q.device)
        return tables[key]

    scale = memory.model.scale
    if t := table("centroid"):
        best = (q @ t.key.T + t.bias).argmax(-1)
        yield t.value[best], t.lse[best]
    if t := table("tangent"):
        best = (q @ t.key.T + t.bias).max(-1)
        yield t.value[best.indices], best.values
    if t := table("token"):
        logits = scale * (q @ t.key.T) + t.bias
        top = logits.topk(min(memory.token_top_k, logits.shape[-1]))
        yield state_of_logits(torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values), t.value)
    if t := table("anchor"):
        o, lse = state_of_logits(scale * (q @ t.key.T) + t.bias, t.value)
        if t := table("residual"):
            best = (q @ t.key.T + t.bias).argmax(-1)
            o, lse = o + t.value[best], lse + t.lse[best]
        yield o, lse


def _table(entries: Entries, h: int, device: torch.device) -> Table:
    head = entries.head(h)
    arrays = (
        rows(entries.key[head]),
        entries.bias[head],
        rows(entries.value[head]),
        entries.lse[head] if entries.lse is not None else None,
    )
    return Table(*(None if a is None else torch.tensor(a, device=device) for a in arrays))
