"""The valid memories that mutations start from."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from helpers.mixed import _layer, mixed_memory
from helpers.models import Tiny
from helpers.tiny import N_VOCAB

from attnmem_local.memory.entries import LayerMemory
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.spec import ModelSpec

MESSAGES = [{"role": "system", "content": "Grüße\n"}]
FIDELITY = {name: 0.5 for name in ("kl_mean", "kl_none", "top1", "nll_full", "nll_memory", "nll_none", "tokens")}


@dataclass
class Base:
    name: str
    weight: float  # probability of being chosen
    content: bytes
    model: Path  # the model that it was built for
    spec: ModelSpec  # properties of that model
    n_vocab: int = N_VOCAB


def base_memories(small: Tiny, wide: Tiny) -> list[Base]:
    """Base memories for a small model, and for one with heads wide enough for Q8_0."""
    mixed = mixed_memory(small.model.spec, small.prefix, q8_0=False)
    quantized = mixed_memory(wide.model.spec, wide.prefix, q8_0=True)
    whole = [0, len(small.prefix.tokens)]

    def one_layer(memory: Memory) -> Memory:
        chat = {"prefix_messages": MESSAGES, "build": {"seed": 1, "share": 0.125, "queries": "repeat"}, "fidelity": FIDELITY}
        return replace(memory, layers=[{1: memory.layers[0][1]}], segment_offset=whole, **chat)

    anchors = [{il: LayerMemory(anchor=layer.anchor) for il, layer in mixed.layers[0].items()}]
    # enough tokens that lookup "auto" searches them
    large = _layer(small.model.spec, {"token": (2100, 30), "anchor": (2, 2)}, np.random.default_rng(0), q8_0=False, times=1)
    return [
        _base("small", 0.4, one_layer(mixed), small),
        _base("chat", 0.2, replace(one_layer(mixed), layers=anchors), small),
        _base("quantized", 0.2, one_layer(quantized), wide),
        _base("mixed", 0.17, mixed, small),
        _base("large", 0.03, replace(mixed, layers=[{0: large}], segment_offset=whole), small),
    ]


def _base(name: str, weight: float, memory: Memory, tiny: Tiny) -> Base:
    content = tiny.save(memory, name).read_bytes()
    return Base(name, weight, content, tiny.path, memory.model)
