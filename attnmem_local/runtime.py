"""MemoryLlama: a llama_cpp.Llama that answers with memories instead of prefixes."""

import hashlib
import inspect
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Sequence

import jinja2
import llama_cpp
from llama_cpp.llama_cache import BaseLlamaCache

from . import native
from .chat import parse_date, parse_messages, parse_tools
from .completion import LivePrompt, RenderedChat
from .content import read_content
from .errors import Invalid, MemoryRefused
from .live import live_chat, live_prompt
from .prefix import Prefix
from .tokenizer import GgufTokenizer


class LoadedMemory:
    """A memory that the runtime has loaded for one model; `MemoryLlama.load_memory` makes them."""

    def __init__(self, llama: "MemoryLlama", path: str | Path):
        self.path = Path(path)
        self._content = read_content(path)
        self._handle: int | None = native.init(llama.model, self._content)
        self._changed = self.path.stat().st_mtime_ns
        self.prefix_text = self.metadata("attnmem.prefix.text") or ""
        self.prefix_messages = self._parsed("attnmem.prefix.messages", parse_messages)
        self.prefix_tools = self._parsed("attnmem.prefix.tools", parse_tools)
        self.prefix_date = self._parsed("attnmem.prefix.date", parse_date)

    def _parsed(self, key: str, parse: Callable[[str], Any]) -> Any:
        text = self.metadata(key)
        try:
            return None if text is None else parse(text)
        except ValueError as error:
            native.free(self.handle)
            raise Invalid(f"the key '{key}' of '{self.path}': {error}") from None

    @property
    def handle(self) -> int:
        if self._handle is None:
            raise ValueError(f"'{self.path}' was freed with the model it was loaded for")
        return self._handle

    @property
    def prefix_tokens(self) -> list[int]:
        """The tokens that the memory stands for; not kept, as a list of them takes ten times their bytes."""
        return native.prefix_tokens(self.handle)

    def last_token(self) -> list[int]:
        """What is fed where nothing follows the prefix: an answer needs a live token."""
        if not (last := self.prefix_tokens[-1:]):
            raise ValueError("the prompt is empty, and so is the prefix of the memory")
        return last

    @property
    def prefix(self) -> Prefix:
        return Prefix(self.prefix_tokens, self.prefix_text, self.prefix_messages, tools=self.prefix_tools, date=self.prefix_date)

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
        try:
            super().__init__(model_path, **options)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template of '{model_path}' is broken: {error}, in line {error.lineno}") from None
        if "chat_template.default" in self._chat_handlers and not (options.get("chat_format") or options.get("chat_handler")):
            self.chat_format = "chat_template.default"  # prefixes are rendered with the model's own template
        self._tokenizer = GgufTokenizer(self._model)
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
        """As in llama_cpp.Llama; the messages and tools of the memory's prefix need not be repeated.

        Raises PrefixMismatch if the rendered chat does not begin with the prefix of the first attached memory.
        """
        leader = self._leader()
        if leader is None:
            return super().create_chat_completion(messages, *args, **options)
        if self.chat_handler or (self.chat_format != "chat_template.default" and "chat_template.default" in self._chat_handlers):
            raise MemoryRefused("a chat with a memory is written with the model's own template; leave out chat_format and chat_handler")
        given = inspect.signature(llama_cpp.Llama.create_chat_completion).bind(self, messages, *args, **options)
        given.apply_defaults()
        request = given.arguments
        del request["self"]
        asked = {name: request[name] for name in ("functions", "function_call", "tool_choice")}
        live = live_chat(self._tokenizer, leader.prefix, messages, request["tools"], **asked)
        request["tools"] = leader.prefix_tools or request["tools"]
        return RenderedChat(self, live or leader.last_token()).complete(request)

    def create_completion(self, prompt, suffix=None, *args, **options):
        """As in llama_cpp.Llama; a text prompt continues the memory's prefix, without another BOS, or repeats it.

        An empty one goes on after the prefix, whose last token is fed again.
        """
        if (leader := self._leader()) is not None and suffix is None:
            live = live_prompt(self._tokenizer, leader.prefix, prompt if isinstance(prompt, str) else list(prompt))
            prompt = LivePrompt(live or leader.last_token(), prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt))
        return super().create_completion(prompt, suffix, *args, **options)

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
