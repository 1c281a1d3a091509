"""The memories that are attached to one llama.cpp context."""

import hashlib
import os
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias
from weakref import WeakValueDictionary

import llama_cpp
from llama_cpp._internals import LlamaContext

from ..engine import native
from ..memory.errors import BadInput, MemoryRefused
from ..memory.memory import Memory
from .loaded import LoadedMemory, absolute, file_version

LoadedFiles: TypeAlias = WeakValueDictionary[tuple[int, ...] | None, LoadedMemory]  # version of a file -> what is still held


@dataclass(frozen=True)
class Attached:
    memory: LoadedMemory
    gain: float = 0.0  # added to the memory's log-sum-exp: 0 as it was built, −inf is off

    def __post_init__(self):
        if not isinstance(self.gain, Real):
            raise TypeError(f"gain must be a number, not {self.gain!r}")


class Attachments:
    """What is attached to a context: the one owner of that state, whose changes are whole even if they are interrupted.

    A change clears the context's KV cache, as the keys and values of live tokens depend on the memories from the second
    layer on.
    """

    def __init__(self, context: LlamaContext, loaded: LoadedFiles, lookup: str = "auto", mapped: bool = False):
        """loaded: files that are loaded for the model of the context; contexts of one model share it."""
        self.context = context
        self.items: tuple[Attached, ...] = ()
        self.lookup = check_lookup(lookup)
        self.mapped = mapped
        self.loaded = loaded
        self._revisions: tuple[int, ...] = ()  # of the items' rows, when the live tokens were last cleared
        self._changing: tuple[Attached, ...] | None = None  # what the context may refer to during a change

    def load(self, source: str | os.PathLike | Memory) -> LoadedMemory:
        """A file is loaded once as long as the result is held, and again when it has changed; a Memory each time."""
        if isinstance(source, Memory):
            return LoadedMemory(self.context.model, source)
        loaded = self.loaded.get(file_version(absolute(source)))
        if loaded is None:
            loaded = LoadedMemory(self.context.model, source, self.mapped)
            self.loaded[loaded.version] = loaded
        return loaded

    def attach(self, memory: str | os.PathLike | Memory | LoadedMemory, gain: float) -> LoadedMemory:
        """Beside the others, or in the place of the same memory or of another version of its file."""
        loaded = memory if isinstance(memory, LoadedMemory) else self.load(memory)
        same = [loaded.is_same(a.memory) for a in self.items]
        others = [a for a, s in zip(self.items, same) if not s]
        at = same.index(True) if True in same else len(others)
        self._set((*others[:at], Attached(loaded, gain), *others[at:]), self.lookup)
        return loaded

    def detach(self, memory: str | os.PathLike | LoadedMemory | None) -> None:
        """One memory, or all. Raises BadInput if it is not attached."""
        if memory is None:
            kept: tuple[Attached, ...] = ()
        elif isinstance(memory, LoadedMemory):
            kept = tuple(a for a in self.items if not a.memory.is_same(memory))
        else:
            kept = tuple(a for a in self.items if not a.memory.is_at(memory))
        if memory is not None and len(kept) == len(self.items):
            raise BadInput(f"{memory if isinstance(memory, LoadedMemory) else repr(os.fsdecode(memory))} is not attached")
        self._set(kept, self.lookup)

    def set_lookup(self, lookup: str) -> None:
        self._set(self.items, check_lookup(lookup))

    def _set(self, items: tuple[Attached, ...], lookup: str) -> None:
        self.settle()
        if (items, lookup) == (self.items, self.lookup):
            return
        self._changing = (*self.items, *items)
        try:
            self._apply(items, lookup)
        except MemoryRefused:  # nothing was changed
            self._changing = None
            raise
        self.items, self.lookup = items, lookup
        self.settle()

    def settle(self) -> None:
        """Finish a change: the context then has exactly `items`, and no live token that was computed otherwise.

        Called before each use of the context, as a change that was interrupted is finished here too: `items` are still
        the old ones if it did not get far. Raises ValueError once the context is closed.
        """
        if self.context.ctx is None:
            return
        revisions = tuple(a.memory.revision for a in self.items)
        if self._changing is not None:
            self._apply(self.items, self.lookup)
        elif revisions == self._revisions:
            return
        if self.context.memory is not None:
            llama_cpp.llama_memory_clear(self.context.memory, False)  # True would write zeros to all of the cache
        self._revisions = revisions
        self._changing = None

    def _apply(self, items: tuple[Attached, ...], lookup: str) -> None:
        native.set_memories(self.context.ctx, [a.memory.handle for a in items], [a.gain for a in items], lookup)

    def key(self) -> tuple[int, ...]:
        """Numbers that no vocabulary has as tokens, for what is attached; empty when nothing is."""
        what = repr([(a.memory.fingerprint, float(a.gain)) for a in self.items])
        return tuple(-1 - byte for byte in hashlib.blake2b(what.encode(), digest_size=8).digest()) if self.items else ()


def check_lookup(lookup: str) -> str:
    if lookup not in (*native.LOOKUPS,):  # a tuple, as a lookup that is not hashable is wrong too
        raise BadInput(f"lookup must be one of {sorted(native.LOOKUPS)}, not {lookup!r}")
    return lookup
