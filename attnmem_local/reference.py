"""A PyTorch runtime of a memory: slow, plain, and the oracle of the tests."""

import torch

from .capture import Live
from .memory import Entries, Memory
from .model import BuildModel
from .state import State, merge, state_of_logits


def memory_state(memory: Memory, layer: int, q: torch.Tensor) -> State:
    """State of all segments for queries q [..., n_head_kv, n_q, d_k] float32, in GGUF order."""
    heads = [[] for _ in range(memory.model.head_count_kv)]
    for segment in memory.layers:
        if (found := segment.get(layer)) is None:
            continue
        for h, states in enumerate(heads):
            q_h = q[..., h, :, :]
            if found.centroid is not None and len(found.centroid.key[found.centroid.head(h)]):
                states.append(_centroid_state(found.centroid, h, q_h))
            if found.anchor is not None and len(found.anchor.key[found.anchor.head(h)]):
                states.append(_anchor_state(found.anchor, h, q_h, memory.model.scale))
    empty = q.new_zeros(*q.shape[:-3], q.shape[-2], memory.model.value_length), q.new_full((*q.shape[:-3], q.shape[-2]), -torch.inf)
    merged = []
    for states in heads:
        state = empty
        for other in states:
            state = merge(state, other)
        merged.append(state)
    return torch.stack([o for o, _ in merged], dim=-3), torch.stack([lse for _, lse in merged], dim=-2)


def memory_session(model: BuildModel, memories: list[Memory]) -> Live:
    """A session whose past is these memories, for running live tokens in PyTorch."""

    def past(layer, q, scale):
        state = None
        for memory in memories:
            other = memory_state(memory, layer, model.to_gguf_order(q))
            state = other if state is None else merge(state, other)
        return state

    return Live(past)


def _arrays(entries: Entries, h: int, like: torch.Tensor):
    return [
        None if array is None else torch.from_numpy(array[entries.head(h)].astype("float32")).to(like.device)
        for array in (entries.key, entries.bias, entries.value, entries.lse)
    ]


def _centroid_state(entries: Entries, h: int, q: torch.Tensor) -> State:
    key, bias, value, lse = _arrays(entries, h, q)
    best = (q @ key.T + bias).argmax(-1)
    return value[best], lse[best]


def _anchor_state(entries: Entries, h: int, q: torch.Tensor, scale: float) -> State:
    key, bias, value, _ = _arrays(entries, h, q)
    return state_of_logits(scale * (q @ key.T) + bias, value)
