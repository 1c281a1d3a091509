"""Attention-state memory for llama.cpp: a long prefix for the price of none.

    build_memory(model, prefix, out)   a prefix becomes a memory (needs the `build` extra)
    MemoryLlama(model, memory=out)     a llama_cpp.Llama that answers with it
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .build import build_memory
    from .errors import MemoryRefused
    from .memory import Memory
    from .runtime import MemoryLlama

__all__ = ["Memory", "MemoryLlama", "MemoryRefused", "build_memory"]

_MODULES = {"Memory": "memory", "MemoryLlama": "runtime", "MemoryRefused": "errors", "build_memory": "build"}


def __getattr__(name: str):
    """Import on first use: running memories needs neither torch nor transformers."""
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
