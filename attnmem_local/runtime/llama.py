"""MemoryLlama: a llama_cpp.Llama that answers with memories instead of prefixes."""

import inspect
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import jinja2
import llama_cpp
from llama_cpp.llama_cache import BaseLlamaCache

from ..engine.tokenizer import GgufTokenizer
from ..engine.weights import weights_of
from ..memory.errors import BadInput, MemoryRefused, StaleStream, Unsupported
from ..memory.memory import Memory
from ..prompt.live import live_chat, live_prompt
from .attachments import Attached, Attachments, LoadedFiles, check_lookup
from .completion import LivePrompt, RenderedChat
from .loaded import LoadedMemory
from .saved_state import CacheByMemory, MemoryState, bind, unbind

_NOT_OF_ATTENTION = ("general.", "tokenizer.")  # keys of a model file that change no key or value of the prefix


_OF_MODEL = {
    *("model_path", "n_gpu_layers", "split_mode", "main_gpu", "tensor_split"),
    *("vocab_only", "use_mmap", "use_mlock", "kv_overrides", "numa"),
}  # options of llama_cpp.Llama

Source: TypeAlias = str | os.PathLike | Memory


class MemoryLlama(llama_cpp.Llama):
    """A llama_cpp.Llama with attention-state memories.

    memory: one memory, or several, to attach from the start: paths of files, or Memory objects, which stay in RAM.
    lookup: how the nearest entry is found: "auto", "stock", "scan", "hnsw" or "lists" (see native.LOOKUPS).
    memory_mmap: map memory files, as use_mmap does the model's, instead of reading them into RAM. Loading is faster and
        processes share the pages, but a file that is overwritten in place under an attached memory (as cp does, where a
        rename does not) then changes the answers, and one that is truncated ends the process.
    Everything else is as in llama_cpp.Llama, and so are completions, chat and streaming: live tokens begin at
    position 0, the prefix is neither prefilled nor attended, and n_ctx is all for live tokens.
    As with llama_cpp.Llama, two threads that use one object at once end the process: give each its own, or a lock.
    Pickling and copying load the model and the memories again from their files, and refuse memories that have changed.
    """

    _attachments: Attachments

    def __init__(
        self,
        model_path: str,
        *,
        memory: Source | Iterable[Source] | None = None,
        lookup: str = "auto",
        memory_mmap: bool = False,
        _sibling: "MemoryLlama | None" = None,  # see new_context
        **options,
    ):
        check_lookup(lookup)
        try:
            with weights_of(_sibling):
                super().__init__(model_path, **options)
        except jinja2.TemplateSyntaxError as error:
            raise BadInput(f"the chat template of '{model_path}' is broken: {error}, in line {error.lineno}") from None
        loaded: LoadedFiles = _sibling._attachments.loaded if _sibling else WeakValueDictionary()
        self._attachments = Attachments(self._ctx, loaded, lookup, memory_mmap)
        self._tokenizer = GgufTokenizer(self._model)
        if "chat_template.default" in self._chat_handlers and not (options.get("chat_format") or options.get("chat_handler")):
            self.chat_format = "chat_template.default"  # prefixes are rendered with the model's own template
        try:
            for item in _several(memory):
                self.attach(item)
        except BaseException:
            self.close()  # at once, not when the traceback is gone
            raise

    def new_context(self, *, memory: Source | Iterable[Source] | None = None, **options) -> "MemoryLlama":
        """Another context with memories and live tokens of its own, which shares the weights with this one.

        A memory that both attach is loaded once. options: of the context, as n_ctx, n_threads or lookup; those of this one if not
        given. The weights stay until all of these contexts are closed. Raises TypeError for an option of the model.
        """
        if fixed := _OF_MODEL & options.keys():
            raise TypeError(f"{', '.join(sorted(fixed))}: the model is loaded already; create another MemoryLlama")
        state = super().__getstate__() | {"lookup": self.lookup, "memory_mmap": self._attachments.mapped} | options
        return type(self)(**state, memory=memory, _sibling=self)

    # attaching

    @property
    def memories(self) -> tuple[Attached, ...]:
        """The attached memories; the first one's prefix is what a chat begins with."""
        return self._attachments.items

    @property
    def lookup(self) -> str:
        return self._attachments.lookup

    def load_memory(self, memory: Source) -> LoadedMemory:
        """Load a memory without attaching it: a file once as long as the result is held, and again when it has changed."""
        return self._attachments.load(memory)

    def attach(self, memory: Source | LoadedMemory, gain: float = 0.0) -> LoadedMemory:
        """Attach a memory beside those attached, or set the gain of one that is.

        A file that has changed since it was attached replaces what it was. A file is attached once, whatever path
        names it. The live tokens are forgotten, and a stream that is being read ends with StaleStream.
        Raises MemoryRefused, changing nothing, for a memory that cannot be used here.
        """
        if changed := [key for key in self.kv_overrides or () if not key.startswith(_NOT_OF_ATTENTION)]:
            raise Unsupported(
                f"kv_overrides changes {', '.join(changed)}: a memory was built from the model as its file says; "
                "leave that out, or write the change into the file and build from it"
            )
        loaded = self._attachments.attach(memory, gain)
        self._settle()
        return loaded

    def detach(self, memory: str | os.PathLike | LoadedMemory | None = None) -> None:
        """Detach one memory, or all. It is freed unless the caller holds its LoadedMemory."""
        self._attachments.detach(memory)
        self._settle()

    def set_lookup(self, lookup: str) -> None:
        """Change how the nearest entry is found."""
        self._attachments.set_lookup(lookup)
        self._settle()

    # live tokens

    _turn = 0  # counts what makes the tokens of a stream that is being read invalid

    def _settle(self) -> None:
        """Make the context and the live tokens agree, whatever was interrupted or cleared since the last use."""
        self._attachments.settle()
        memory = self._ctx.memory
        if self.n_tokens > 0 and memory is not None and llama_cpp.llama_memory_seq_pos_max(memory, 0) < 0:
            self.reset()

    def reset(self) -> None:
        self._turn += 1
        super().reset()

    def eval(self, tokens) -> None:
        self._settle()
        for i in range(0, max(len(tokens), 1), self.n_batch):
            batch = tokens[i : i + self.n_batch]
            if len(batch) > 0:
                self._requires_eval = True  # until super() has counted them: interrupted before, the logits are of other tokens
            super().eval(batch)

    def generate(self, tokens, *args, **options) -> Generator[int, Sequence[int] | None, None]:  # type: ignore[override]
        """As in llama_cpp.Llama.

        Raises StaleStream where it would go on with other tokens or memories than it began with: after attach, detach,
        set_lookup, reset, load_state, or another generation.
        """
        return self._read(super().generate(tokens, *args, **options), self.memories)

    def _create_completion(self, *args, **options) -> Generator:
        return self._read(super()._create_completion(*args, **options), self.memories)

    def _read(self, stream: Any, memories: tuple[Attached, ...]) -> Generator[Any, Any, None]:
        """What a generator yields, as long as nothing takes the live tokens away from it.

        memories: those that the prompt was made for, before the generator starts.
        """
        self._turn += 1
        turn = sent = None
        with closing(stream):
            while True:
                self._settle()
                if self.memories is not memories or turn not in (None, self._turn):
                    raise StaleStream("the memories or the live tokens changed while the stream was read; ask again")
                try:
                    item = stream.send(sent)
                except StopIteration:
                    return
                turn = self._turn
                sent = yield item

    # the prefix is never fed twice

    def create_chat_completion(self, messages, *args, **options):
        """As in llama_cpp.Llama; the messages and tools of the memory's prefix need not be repeated.

        Raises PrefixMismatch if the rendered chat does not begin with the prefix of the first attached memory.
        """
        leader = self._leader()
        if leader is None:
            return super().create_chat_completion(messages, *args, **options)
        if self.chat_handler or (self.chat_format != "chat_template.default" and "chat_template.default" in self._chat_handlers):
            raise MemoryRefused(
                "a chat with a memory is written with the model's own template; leave out chat_format and chat_handler"
            )
        given = inspect.signature(llama_cpp.Llama.create_chat_completion).bind(self, messages, *args, **options)
        given.apply_defaults()
        request = given.arguments
        del request["self"]
        asked = {name: request[name] for name in ("functions", "function_call", "tool_choice")}
        live = live_chat(self._tokenizer, leader.prefix, messages, request["tools"], **asked)
        request["tools"] = leader.prefix_tools or request["tools"]
        return RenderedChat(self, live).complete(request)

    def create_completion(self, prompt, suffix=None, *args, **options):
        """As in llama_cpp.Llama; a text prompt continues the memory's prefix, without another BOS, or repeats it.

        With an empty one, or the prefix itself, the answer goes on where the prefix ends.
        """
        if (leader := self._leader()) is not None and suffix is None:
            live = live_prompt(self._tokenizer, leader.prefix, prompt if isinstance(prompt, str) else list(prompt))
            prompt = LivePrompt(live, prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt))
        return super().create_completion(prompt, suffix, *args, **options)

    def _leader(self) -> LoadedMemory | None:
        return self.memories[0].memory if self.memories else None

    # saved states belong to the memories they were computed with

    def save_state(self) -> llama_cpp.LlamaState | MemoryState:  # type: ignore[override]
        self._settle()
        return bind(super().save_state(), self._attachments.key())

    def load_state(self, state: llama_cpp.LlamaState | MemoryState) -> None:
        """As in llama_cpp.Llama. Raises MemoryRefused for a state that was computed with other memories."""
        self._settle()
        state = unbind(state, self._attachments.key())
        self._turn += 1
        try:
            super().load_state(state)
        except BaseException:
            self.n_tokens = 0  # the tokens it names may not be in the cache
            raise

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        super().set_cache(None if cache is None else CacheByMemory(cache, self._attachments.key))

    # copies and the end

    def __getstate__(self) -> dict:
        self._settle()
        if any(a.memory.path is None for a in self.memories):
            raise TypeError("a memory in RAM is neither pickled nor copied; save it to a file, and attach that")
        memories = [(a.memory.path, a.gain, a.memory.fingerprint) for a in self.memories]
        return super().__getstate__() | {"memory": memories, "lookup": self.lookup, "memory_mmap": self._attachments.mapped}

    def __setstate__(self, state: dict) -> None:
        """Raises MemoryRefused if the file of a memory is not what it was."""
        super().__setstate__(state | {"memory": None})
        try:
            for path, gain, fingerprint in state["memory"]:
                loaded = self.load_memory(path)
                if loaded.fingerprint != fingerprint:
                    raise MemoryRefused(f"'{path}' has changed since the MemoryLlama was pickled or copied; attach it to a new one")
                self.attach(loaded, gain)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the model and the memories. Later use raises ValueError, and so does a stream that is still read."""
        if not hasattr(self, "_stack"):  # __init__ was refused
            return
        closed: Any = _Closed()
        self._ctx = self._model = self._batch = self.tokenizer_ = closed  # what _stack frees is held there
        self._attachments = Attachments(closed, WeakValueDictionary())
        super().close()


def _several(memory: Source | Iterable[Source] | None) -> Iterable[Source]:
    """A parameter that is one memory, several or none."""
    if memory is None:
        return ()
    return (memory,) if isinstance(memory, (str, bytes, os.PathLike, Memory)) else memory


class _Closed:
    """In the place of what was freed: llama_cpp.Llama would hand llama.cpp null pointers."""

    def __getattr__(self, name: str):
        raise ValueError("this MemoryLlama is closed; create another one")
