"""Tiny random models, each with a prefix and memories of it."""

from pathlib import Path

import numpy as np

from attnmem_local.builder.budget import uniform_plan
from attnmem_local.builder.build import exact_memory
from attnmem_local.builder.capture import prefill
from attnmem_local.builder.fit import fit_memory
from attnmem_local.builder.job import Build, LiveText
from attnmem_local.builder.model import load_model
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.prefix import Prefix

from .tiny import write_tiny


class Tiny:
    """A tiny random model, a random prefix of 240 tokens with its keys and values, and 120 live tokens."""

    def __init__(self, folder: Path, architecture: str = "llama", head_dim: int = 16):
        self.folder = folder
        self.path = write_tiny(folder / f"{architecture}.gguf", DEFAULT_MODEL, architecture, head_dim=head_dim)
        self.model = load_model(self.path)
        tokens = np.random.default_rng(7).integers(300, 1024, 360).tolist()
        self.prefix = Prefix(tokens[:240], self.model.tokenizer.decode(tokens[:240]))
        self.live = tokens[240:]
        self.kv = prefill(self.model, self.prefix.tokens)

    def exact(self):
        return exact_memory(self.model, self.prefix, self.kv)

    def build(self, windows, seed=0) -> Build:
        """A build that has come as far as the fit, for live text like these windows."""
        return Build(self.model, self.prefix, seed, kv=self.kv, text=LiveText(windows))

    def fitted(self, seed=0, **plan):
        windows = np.random.default_rng(8).integers(300, 1024, (6, 96)).tolist()
        return fit_memory(self.build(windows, seed), uniform_plan(self.model.spec, **({"entries": 64} | plan)))

    def save(self, memory, name: str) -> Path:
        path = self.folder / f"{name}.mem.gguf"
        memory.save(path)
        return path


def save_exact(tiny, name: str, bias: float = 0.0) -> Path:
    """Save an exact memory with a bias added to all keys, which makes them weigh more or less than in the prefix."""
    memory = tiny.exact()
    for layer in memory.layers[0].values():
        layer.anchor.bias = layer.anchor.bias + np.float32(bias)
    return tiny.save(memory, name)
