"""MemoryLlama: a llama_cpp.Llama that answers with memories instead of prefixes."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Sequence

import llama_cpp
from llama_cpp.llama_cache import BaseLlamaCache

from . import native
from .content import read_content
from .errors import Invalid, MemoryRefused
from .prefix import drop_prefix, parse_messages, with_prefix_messages


class LoadedMemory:
    """A memory that the runtime has loaded for one model; `MemoryLlama.load_memory` makes them."""

    def __init__(self, llama: "MemoryLlama", path: str | Path):
        self.path = Path(path)
        self._content = read_content(path)
        self._handle: int | None = native.init(llama.model, self._content)
        self._changed = self.path.stat().st_mtime_ns
        messages = native.metadata(self.handle, "attnmem.prefix.messages")
        try:
            self.prefix_messages = None if messages is None else parse_messages(messages)
        except ValueError as error:
            native.free(self.handle)
            raise Invalid(f"the key 'attnmem.prefix.messages' of '{path}': {error}") from None

    @property
    def handle(self) -> int:
        if self._handle is None:
            raise ValueError(f"'{self.path}' was freed with the model it was loaded for")
        return self._handle

    @property
    def prefix_tokens(self) -> list[int]:
        """The tokens that the memory stands for; not kept, as a list of them takes ten times their bytes."""
        return native.prefix_tokens(self.handle)

    def metadata(self, key: str) -> str | None:
        """A scalar metadata value of the file as text, None if it has no such key."""
        return native.metadata(self.handle, key)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the file's content. Raises MemoryRefused if the file has changed since it was loaded."""
        if not self.path.exists() or self.path.stat().st_mtime_ns != self._changed:
            raise MemoryRefused(f"'{self.path}' has changed since it was loaded; attach it again")
        with open(self.path, "rb") as f:
            return hashlib.file_digest(f, "blake2b").hexdigest()[:16]


@dataclass(frozen=True)
class Attached:
    memory: LoadedMemory
    gain: float = 0.0  # added to the memory's log-sum-exp: 0 as it was built, −inf is off


class MemoryLlama(llama_cpp.Llama):
    """A llama_cpp.Llama with attention-state memories.

    memory: one or several paths or loaded memories to attach from the start.
    lookup: how the nearest entry is found: "auto", "stock", "scan", "hnsw" or "lists" (see native.LOOKUPS).
    Everything else is as in llama_cpp.Llama, and so are completions, chat and streaming: live tokens begin at
    position 0, the prefix is neither prefilled nor attended, and n_ctx is all for live tokens.

    Raises MemoryRefused, attaching nothing, if a memory does not fit the model or an option of the context.
    """

    def __init__(self, model_path: str, *, memory=(), lookup: str = "auto", **options):
        self._attached: list[Attached] = []
        self._loaded: dict[tuple[Path, int], LoadedMemory] = {}
        if lookup not in native.LOOKUPS:
            raise ValueError(f"lookup must be one of {sorted(native.LOOKUPS)}, not '{lookup}'")
        self._lookup = lookup
        super().__init__(model_path, **options)
        if not {"chat_format", "chat_handler"} & options.keys() and "chat_template.default" in self._chat_handlers:
            self.chat_format = "chat_template.default"  # prefixes are rendered with the model's own template
        for item in [memory] if isinstance(memory, (str, Path, LoadedMemory)) else memory or ():
            self.attach(item)

    # attaching

    @property
    def memories(self) -> tuple[Attached, ...]:
        """The attached memories; the first one's prefix is what a chat begins with."""
        return tuple(self._attached)

    @property
    def lookup(self) -> str:
        return self._lookup

    def load_memory(self, path: str | Path) -> LoadedMemory:
        """Load a memory without attaching it. A file is loaded once, and again when it has changed."""
        path = Path(path)
        key = (path.resolve(), path.stat().st_mtime_ns if path.exists() else 0)
        if key not in self._loaded:
            self._loaded[key] = LoadedMemory(self, path)
        return self._loaded[key]

    def attach(self, memory: str | Path | LoadedMemory, gain: float = 0.0) -> LoadedMemory:
        """Attach a memory beside those attached, or set the gain of one that is."""
        loaded = memory if isinstance(memory, LoadedMemory) else self.load_memory(memory)
        path = loaded.path.resolve()
        others = [a for a in self._attached if a.memory.path.resolve() != path]
        at = next((i for i, a in enumerate(self._attached) if a.memory.path.resolve() == path), len(others))
        self._set([*others[:at], Attached(loaded, gain), *others[at:]], self._lookup)
        return loaded

    def detach(self, memory: str | Path | LoadedMemory | None = None) -> None:
        """Detach one memory, or all."""
        path = memory.path if isinstance(memory, LoadedMemory) else memory
        kept = [] if path is None else [a for a in self._attached if a.memory.path.resolve() != Path(path).resolve()]
        if path is not None and len(kept) == len(self._attached):
            raise ValueError(f"'{path}' is not attached")
        self._set(kept, self._lookup)

    def set_lookup(self, lookup: str) -> None:
        """Change how the nearest entry is found."""
        self._set(self._attached, lookup)

    def _set(self, attached: list[Attached], lookup: str) -> None:
        native.set_memories(self.ctx, [a.memory.handle for a in attached], [a.gain for a in attached], lookup)
        self._attached, self._lookup = attached, lookup
        self._forget()

    def _forget(self) -> None:
        """Live keys and values depend on the memories from the second layer on: none of them may be used again."""
        if self._ctx.memory is not None:
            llama_cpp.llama_memory_clear(self._ctx.memory, False)  # kv_cache_clear would write zeros to all of the cache
        self.reset()

    # the prefix is never fed twice

    def create_chat_completion(self, messages, *args, **options):
        """As in llama_cpp.Llama; the messages of the memory's prefix need not be repeated.

        Raises PrefixMismatch if the rendered chat does not begin with the prefix of the first attached memory.
        """
        leader = self._leader()
        if leader is None:
            return super().create_chat_completion(messages, *args, **options)
        if leader.prefix_messages is None:
            raise MemoryRefused(
                f"'{leader.path}' was built from plain text, which no chat template begins with; "
                "for chat, build it from chat messages or with --system"
            )
        self._drop_prefix = leader.prefix_tokens
        try:
            return super().create_chat_completion(with_prefix_messages(messages, leader.prefix_messages), *args, **options)
        finally:
            self._drop_prefix = None

    _drop_prefix: list[int] | None = None

    def create_completion(self, prompt, *args, **options):
        """As in llama_cpp.Llama; a text prompt continues the memory's prefix, without another BOS."""
        if self._drop_prefix is not None:  # a rendered chat
            prompt = drop_prefix(prompt, self._drop_prefix)
        elif (leader := self._leader()) is not None and options.get("suffix") is None:
            tokens = self.tokenize(prompt.encode(), add_bos=False, special=True) if isinstance(prompt, str) else list(prompt)
            prefix = leader.prefix_tokens
            n = len(prefix)
            prompt = tokens[n:] if tokens[:n] == prefix else tokens
        return super().create_completion(prompt, *args, **options)

    def _leader(self) -> LoadedMemory | None:
        return self._attached[0].memory if self._attached else None

    # saved states belong to the memories they were computed with

    def _memory_key(self) -> tuple[int, ...]:
        """Numbers that no vocabulary has as tokens, for what is attached; empty when nothing is."""
        what = repr([(a.memory.fingerprint, a.gain) for a in self._attached])
        return tuple(-1 - byte for byte in hashlib.blake2b(what.encode(), digest_size=8).digest()) if self._attached else ()

    def save_state(self):
        state = super().save_state()
        state.memory_key = self._memory_key()
        return state

    def load_state(self, state) -> None:
        """As in llama_cpp.Llama. Raises MemoryRefused for a state that was computed with other memories."""
        if getattr(state, "memory_key", ()) != self._memory_key():
            raise MemoryRefused("the saved state was computed with other memories attached; attach the same ones with the same gains")
        super().load_state(state)

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        super().set_cache(None if cache is None else _CacheByMemory(self, cache))

    def close(self) -> None:
        if hasattr(self, "_stack"):  # not if __init__ was refused
            super().close()
        for loaded in self._loaded.values():
            loaded._handle = None  # freed with the model
        self._attached = []


class _CacheByMemory(BaseLlamaCache):
    """A prompt cache that finds only states computed with the memories that are attached."""

    def __init__(self, llama: MemoryLlama, cache: BaseLlamaCache):
        super().__init__(cache.capacity_bytes)
        self.llama = llama
        self.cache = cache

    def _key(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return (*self.llama._memory_key(), *tokens)

    @property
    def cache_size(self) -> int:
        return self.cache.cache_size

    def __getitem__(self, tokens):
        state = self.cache[self._key(tokens)]
        if getattr(state, "memory_key", ()) != self.llama._memory_key():
            raise KeyError("the cached state belongs to other memories")
        return state

    def __contains__(self, tokens) -> bool:
        return self._key(tokens) in self.cache

    def __setitem__(self, tokens, state) -> None:
        self.cache[self._key(tokens)] = state
