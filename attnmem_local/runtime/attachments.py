"""The memories attached to one llama.cpp context."""

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

LoadedFiles: TypeAlias = WeakValueDictionary[tuple[int, ...] | None, LoadedMemory]  # file_version -> memory, while it is in use


@dataclass(frozen=True)
class Attached:
    memory: LoadedMemory
    gain: float = 0.0  # added to the memory's log-sum-exp: 0 leaves it as built, −inf turns it off

    def __post_init__(self):
        if not isinstance(self.gain, Real):
            raise TypeError(f"gain must be a number, not {self.gain!r}")


class Attachments:
    """The sole owner of a context's memories. A change takes effect as a whole, even if it is interrupted.

    Each change clears the KV cache, because from the second layer on the keys and values of live tokens depend on the memories.
    """

    def __init__(self, context: LlamaContext, loaded: LoadedFiles, lookup: str = "auto", mapped: bool = False):
        """loaded: the memory files loaded for the context's model, shared by its contexts. mapped: see read_content."""
        self.context = context
        self.items: tuple[Attached, ...] = ()
        self.lookup = check_lookup(lookup)
        self.mapped = mapped
        self.loaded = loaded
        self._revisions: tuple[int, ...] = ()  # revision of each item when the KV cache was last cleared
        self._changing: tuple[Attached, ...] | None = None  # during a change, all that the context may refer to, to keep it alive

    def load(self, source: str | os.PathLike | Memory) -> LoadedMemory:
        """Load a memory. A file is loaded again only if it has changed or is no longer in use; a Memory is loaded every time."""
        if isinstance(source, Memory):
            return LoadedMemory(self.context.model, source)
        loaded = self.loaded.get(file_version(absolute(source)))
        if loaded is None:
            loaded = LoadedMemory(self.context.model, source, self.mapped)
            self.loaded[loaded.version] = loaded
        return loaded

    def attach(self, memory: str | os.PathLike | Memory | LoadedMemory, gain: float) -> LoadedMemory:
        """Attach a memory beside the others; it takes the place of the same memory or of another version of its file."""
        loaded = memory if isinstance(memory, LoadedMemory) else self.load(memory)
        replaced = [loaded.is_same(attached.memory) for attached in self.items]
        others = [attached for attached, is_replaced in zip(self.items, replaced) if not is_replaced]
        i = replaced.index(True) if True in replaced else len(others)
        self._set((*others[:i], Attached(loaded, gain), *others[i:]), self.lookup)
        return loaded

    def detach(self, memory: str | os.PathLike | LoadedMemory | None) -> None:
        """Detach one memory, or all for None. Raises BadInput if it is not attached."""
        if memory is None:
            kept: tuple[Attached, ...] = ()
        elif isinstance(memory, LoadedMemory):
            kept = tuple(a for a in self.items if not a.memory.is_same(memory))
        else:
            kept = tuple(a for a in self.items if not a.memory.is_at(memory))
        if memory is not None and len(kept) == len(self.items):
            name = memory if isinstance(memory, LoadedMemory) else repr(os.fsdecode(memory))
            attached = ", ".join(str(a.memory) for a in self.items) or "nothing"
            raise BadInput(f"{name} is not attached; attached: {attached}")
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
        except MemoryRefused:  # the native library has changed nothing
            self._changing = None
            raise
        self.items, self.lookup = items, lookup
        self.settle()

    def settle(self) -> None:
        """Finish a change: the context then has exactly `items`, and no live token computed with other memories.

        Called before each use of the context, so that a change that was interrupted is finished, or undone if `items` had not
        been replaced yet. Raises ValueError once the context is closed.
        """
        if self.context.ctx is None:
            return
        revisions = tuple(a.memory.revision for a in self.items)
        if self._changing is not None:
            self._apply(self.items, self.lookup)
        elif revisions == self._revisions:
            return
        if self.context.memory is not None:
            llama_cpp.llama_memory_clear(self.context.memory, False)  # llama.cpp's KV cache; True would also zero its data
        self._revisions = revisions
        self._changing = None

    def _apply(self, items: tuple[Attached, ...], lookup: str) -> None:
        native.set_memories(self.context.ctx, [a.memory.handle for a in items], [a.gain for a in items], lookup)

    def key(self) -> tuple[int, ...]:
        """A hash of the attached memories and gains, as 8 negative numbers so that none is a token; empty without memories."""
        attached = repr([(a.memory.fingerprint, float(a.gain)) for a in self.items])
        return tuple(-1 - byte for byte in hashlib.blake2b(attached.encode(), digest_size=8).digest()) if self.items else ()


def check_lookup(lookup: str) -> str:
    """The same lookup. Raises BadInput if there is no such lookup."""
    if lookup not in (*native.LOOKUPS,):  # a tuple: in the dict itself, a value that cannot be hashed would raise TypeError
        raise BadInput(f"lookup must be one of {sorted(native.LOOKUPS)}, not {lookup!r}")
    return lookup
