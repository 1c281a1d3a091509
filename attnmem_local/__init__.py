"""Attention-state memory for llama.cpp: a long prefix for the price of none.

    build_memory(model, prefix, out)   a prefix becomes a memory (needs the `build` extra)
    MemoryLlama(model, memory=out)     a llama_cpp.Llama that answers with it

README.md lists the rooms of the package; tests/test_house.py says which may import which.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .builder.build import build_memory
    from .memory.errors import AttnmemError, MemoryRefused
    from .memory.memory import Memory
    from .runtime.llama import MemoryLlama

__all__ = ["AttnmemError", "Memory", "MemoryLlama", "MemoryRefused", "build_memory"]

_MODULES = {
    "AttnmemError": "memory.errors",
    "Memory": "memory.memory",
    "MemoryLlama": "runtime.llama",
    "MemoryRefused": "memory.errors",
    "build_memory": "builder.build",
}


def __getattr__(name: str):
    """Import on first use: running memories needs neither torch nor transformers."""
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
