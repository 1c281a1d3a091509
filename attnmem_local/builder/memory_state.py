"""The builder's runtime: the state that a memory gives to queries, in PyTorch.

While a memory is fitted, the layers above run on it, and its fidelity to the full prefix is measured with it. The tests
compare llama.cpp's runtime with it.
"""

import torch

from ..memory.entries import Entries
from ..memory.memory import Memory
from ..memory.tables import rows
from .entries import KINDS
from .entries.head import HeadEntries
from .state import State, merge

Converted = dict[tuple[int, int, str, int], HeadEntries]  # by segment, layer, kind and KV head


def memory_state(memory: Memory, layer: int, q: torch.Tensor, converted: Converted | None = None) -> State:
    """The state of all segments for queries q [..., n_head_kv, n_q, d_k] float32, in GGUF order. Every search is exact.

    converted: tables of this memory that earlier calls have converted; new ones are added.
    """
    converted = {} if converted is None else converted
    merged = []
    for h in range(memory.model.head_count_kv):
        q_h = q[..., h, :, :]
        state = q.new_zeros(*q_h.shape[:-1], memory.model.value_length), q.new_full(q_h.shape[:-1], -torch.inf)
        for s in range(len(memory.layers)):
            for other in segment_states(memory, s, layer, h, q_h, converted):
                state = merge(state, other)
        merged.append(state)
    return torch.stack([o for o, _ in merged], dim=-3), torch.stack([lse for _, lse in merged], dim=-2)


def segment_states(memory: Memory, s: int, layer: int, h: int, q: torch.Tensor, converted: Converted) -> list[State]:
    """The states of KV head h in a segment for queries q [..., n_q, d_k], one for each kind that has a state of its own."""
    states: dict[str, State] = {}
    if (layer_memory := memory.layers[s].get(layer)) is None:
        return []
    for kind in KINDS:
        entries: Entries | None = getattr(layer_memory, kind.name)
        if entries is None or entries.offset[h] == entries.offset[h + 1]:
            continue
        key = (s, layer, kind.name, h)
        if key not in converted:
            converted[key] = head_entries(entries, h, q.device)
        o, lse = kind.state(converted[key], q, memory)
        if kind.corrects is None:
            states[kind.name] = o, lse
        else:
            base_o, base_lse = states[kind.corrects]
            states[kind.corrects] = base_o + o, base_lse + lse
    return list(states.values())


def head_entries(entries: Entries, h: int, device: torch.device) -> HeadEntries:
    """The entries of KV head h in float32, in GGUF order."""
    head = entries.head(h)

    def tensor(array):
        return torch.tensor(array, device=device)

    lse = None if entries.lse is None else tensor(entries.lse[head])
    return HeadEntries(tensor(rows(entries.key[head])), tensor(entries.bias[head]), tensor(rows(entries.value[head])), lse)
