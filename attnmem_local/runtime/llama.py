"""MemoryLlama: a llama_cpp.Llama that answers with memories in place of prefixes."""

import inspect
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import jinja2
import llama_cpp
from llama_cpp._internals import LlamaContext
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

_NOT_OF_ATTENTION = ("general.", "tokenizer.")  # GGUF keys that affect no key or value of the prefix

_OF_MODEL = {  # options of llama_cpp.Llama that apply to the weights, not to a context
    *("model_path", "n_gpu_layers", "split_mode", "main_gpu", "tensor_split"),
    *("vocab_only", "use_mmap", "use_mlock", "kv_overrides", "numa"),
}

Source: TypeAlias = str | os.PathLike | Memory
Sources: TypeAlias = Source | LoadedMemory | Iterable[Source | LoadedMemory] | None


class MemoryLlama(llama_cpp.Llama):
    """A llama_cpp.Llama with attention-state memories.

    memory: one memory or several to attach from the start, as paths of files or as Memory objects in RAM.
    lookup: the search for entries, one of "auto", "stock", "scan", "hnsw" and "lists" (see native.LOOKUPS).
    memory_mmap: map memory files, as use_mmap maps the model, instead of reading them into RAM. Loading is faster and processes
        share the pages, but if the file of an attached memory is overwritten in place (as by cp, but not by a rename), answers
        change, and if it is truncated, the process is killed.

    All other parameters, completions, chat and streaming are as in llama_cpp.Llama. Live tokens begin at position 0, the prefix
    is neither prefilled nor in the KV cache, and all of n_ctx is left to live tokens.
    As with llama_cpp.Llama, concurrent use by two threads can crash the process: give each thread its own object, or use a lock.
    Pickling and copying load the model and the memories again from their files, and refuse memories that have changed.
    """

    _attachments: Attachments

    def __init__(
        self,
        model_path: str,
        *,
        memory: Sources = None,
        lookup: str = "auto",
        memory_mmap: bool = False,
        _sibling: "MemoryLlama | None" = None,  # see new_context
        **options,
    ):
        check_lookup(lookup)
        self._file = os.path.abspath(model_path)  # the same after os.chdir
        try:
            with weights_of(_sibling):
                super().__init__(model_path, **options)
            loaded: LoadedFiles = _sibling._attachments.loaded if _sibling else WeakValueDictionary()
            self._attachments = Attachments(self._ctx, loaded, lookup, memory_mmap)
            self._tokenizer = GgufTokenizer(self._model)
            if "chat_template.default" in self._chat_handlers and not (options.get("chat_format") or options.get("chat_handler")):
                self.chat_format = "chat_template.default"  # the model's own template, which prefixes are rendered with
            for item in _several(memory):
                self.attach(item)
        except BaseException as error:
            self.close()  # now, rather than when the traceback that refers to it is released
            if (refusal := _refusal(error, model_path, options)) is error:
                raise
            raise refusal from None

    def new_context(self, *, memory: Sources = None, **options) -> "MemoryLlama":
        """A MemoryLlama that shares the weights with this one, but has its own memories and live tokens.

        A file that both attach is loaded once. options: options of the context, such as n_ctx, n_threads or lookup; the default is
        that of this MemoryLlama. The weights are freed when all contexts are closed. Raises TypeError for an option of the model.
        """
        if fixed := _OF_MODEL & options.keys():
            raise TypeError(f"{', '.join(sorted(fixed))} cannot differ between contexts of one model; create another MemoryLlama")
        state = super().__getstate__() | {"lookup": self.lookup, "memory_mmap": self._attachments.mapped} | options
        other = type(self)(**(state | {"model_path": self._file}), memory=memory, _sibling=self)
        other.model_path = self.model_path  # which answers name
        return other

    # attaching

    @property
    def memories(self) -> tuple[Attached, ...]:
        """The attached memories; chats and completions continue the prefix of the first one."""
        return self._attachments.items

    @property
    def lookup(self) -> str:
        return self._attachments.lookup

    def load_memory(self, memory: Source) -> LoadedMemory:
        """Load a memory without attaching it. A file that is in use already is loaded again only if it has changed."""
        return self._attachments.load(memory)

    def attach(self, memory: Source | LoadedMemory, gain: float = 0.0) -> LoadedMemory:
        """Attach a memory beside the others, or set the gain of one that is attached.

        A file is attached once, whatever path names it; a new version of the file replaces the old one. Live tokens are dropped,
        and a stream that is being read ends with StaleStream.
        Raises MemoryRefused, changing nothing, for a memory that cannot be used here.
        """
        if changed := [key for key in self.kv_overrides or () if not key.startswith(_NOT_OF_ATTENTION)]:
            raise Unsupported(
                f"kv_overrides changes {', '.join(changed)}, but a memory is built from the model without overrides; "
                "leave them out, or write the change into a model file and build from that"
            )
        loaded = self._attachments.attach(memory, gain)
        self._settle()
        return loaded

    def detach(self, memory: str | os.PathLike | LoadedMemory | None = None) -> None:
        """Detach one memory, or all for None, and free it unless the caller holds its LoadedMemory."""
        self._attachments.detach(memory)
        self._settle()

    def set_lookup(self, lookup: str) -> None:
        """Change the search for entries; see the parameter lookup."""
        self._attachments.set_lookup(lookup)
        self._settle()

    # live tokens

    _turn = 0  # counts the events that invalidate a stream that is being read

    def _settle(self) -> None:
        """Finish what was interrupted, and drop n_tokens if the KV cache was cleared, so that context and live tokens agree."""
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
                self._requires_eval = True  # super() clears it at its end; after an interrupt the logits are stale
            super().eval(batch)

    def generate(self, tokens, *args, **options) -> Generator[int, Sequence[int] | None, None]:  # type: ignore[override]
        """As in llama_cpp.Llama.

        Raises StaleStream if the memories or live tokens that it began with have changed: after attach, detach, set_lookup,
        reset, load_state or another generation.
        """
        return self._read(super().generate(tokens, *args, **options), self.memories)

    def _create_completion(self, *args, **options) -> Generator:
        return self._read(super()._create_completion(*args, **options), self.memories)

    def _read(self, stream: Any, memories: tuple[Attached, ...]) -> Generator[Any, Any, None]:
        """Yields the items of a generator until the memories or live tokens change, then raises StaleStream.

        memories: the memories that the prompt was made for, taken before the generator starts.
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

    # prompts, stripped of the prefix

    def create_chat_completion(self, messages, *args, **options):
        """As in llama_cpp.Llama; the messages and tools of the memory's prefix may be repeated or left out.

        Raises PrefixMismatch if the rendered chat does not begin with the prefix of the first attached memory.
        """
        leader = self._leader()
        if leader is None:
            return super().create_chat_completion(messages, *args, **options)
        if self.chat_handler or (self.chat_format != "chat_template.default" and "chat_template.default" in self._chat_handlers):
            raise MemoryRefused(
                "a chat with a memory is rendered with the model's own template; leave out chat_format and chat_handler"
            )
        arguments = inspect.signature(llama_cpp.Llama.create_chat_completion).bind(self, messages, *args, **options)
        arguments.apply_defaults()
        request = arguments.arguments
        del request["self"]
        template_options = {name: request[name] for name in ("functions", "function_call", "tool_choice")}
        live = live_chat(self._tokenizer, leader.prefix, messages, request["tools"], **template_options)
        request["tools"] = leader.prefix_tools or request["tools"]
        return RenderedChat(self, live).complete(request)

    def create_completion(self, prompt, suffix=None, *args, **options):
        """As in llama_cpp.Llama; the prompt continues the memory's prefix, or repeats it first. No BOS is added.

        If it is empty or the prefix itself, the answer begins where the prefix ends.
        """
        if (leader := self._leader()) is not None and suffix is None:
            live = live_prompt(self._tokenizer, leader.prefix, prompt if isinstance(prompt, str) else list(prompt))
            prompt = LivePrompt(live, prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt))
        return super().create_completion(prompt, suffix, *args, **options)

    def _leader(self) -> LoadedMemory | None:
        return self.memories[0].memory if self.memories else None

    # saved states and caches, bound to the memories they were computed with

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
            self.n_tokens = 0  # the KV cache may not contain these tokens
            raise

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        super().set_cache(None if cache is None else CacheByMemory(cache, self._attachments.key))

    # pickling, copying, closing

    def __getstate__(self) -> dict:
        self._settle()
        if any(a.memory.path is None for a in self.memories):
            raise TypeError("a memory in RAM can be neither pickled nor copied; save it to a file, and attach the file")
        memories = [(a.memory.path, a.gain, a.memory.fingerprint) for a in self.memories]
        return super().__getstate__() | {"memory": memories, "lookup": self.lookup, "memory_mmap": self._attachments.mapped}

    def __setstate__(self, state: dict) -> None:
        """Raises MemoryRefused if the file of a memory has changed."""
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
        """Free the model and the memories. Later use raises ValueError, also in streams that are still being read."""
        if not hasattr(self, "_stack"):  # __init__ was refused
            return
        model: Any = getattr(self, "_model", None)  # __init__ may have failed before it set them
        context, attachments = getattr(self, "_ctx", None), getattr(self, "_attachments", None)
        closed: Any = _Closed()
        self._ctx = self._model = self._batch = self.tokenizer_ = closed  # super() frees the originals, which _stack holds
        self._attachments = Attachments(closed, WeakValueDictionary())
        super().close()
        if isinstance(context, LlamaContext):
            model.forget(context)
        del attachments  # only now: a memory is not freed while a context is attached to it


def _several(memory: Sources) -> Iterable[Source | LoadedMemory]:
    """The values of a parameter that takes one memory, several or None; attach refuses those that are not memories."""
    if memory is None:
        return ()
    if isinstance(memory, (str, bytes, os.PathLike, Memory, LoadedMemory)):
        return (memory,)
    return memory if isinstance(memory, Iterable) else (memory,)


def _refusal(error: BaseException, model_path: str, options: dict) -> BaseException:
    """The same error, or what llama_cpp.Llama raises for bad input as a refusal that says what to do."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return BadInput(f"the chat template of '{model_path}' is broken: {error}, in line {error.lineno}")
    if not isinstance(error, ValueError):
        return error
    if "Model path does not exist" in str(error):
        return BadInput(f"there is no model at '{model_path}'")
    if "Failed to load model" in str(error):
        return BadInput(f"the model '{model_path}' cannot be loaded: it is damaged, or not known to this llama.cpp")
    if "Failed to create llama_" in str(error):
        cache = ", or a KV cache of another type: not every one fits every model" if {"type_k", "type_v"} & options.keys() else ""
        n_ctx = options.get("n_ctx", 512)  # the default of llama_cpp.Llama
        return BadInput(f"there is no room for a context of {n_ctx} tokens; choose a smaller one (--ctx){cache}")
    return error


class _Closed:
    """A stand-in for freed objects, which llama_cpp.Llama would otherwise pass to llama.cpp as null pointers."""

    def __getattr__(self, name: str):
        raise ValueError("this MemoryLlama is closed; create another one")
