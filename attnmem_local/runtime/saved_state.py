"""Saved states and prompt caches, each bound to the memories it was computed with."""

from collections.abc import Callable, Sequence

from llama_cpp import LlamaState
from llama_cpp.llama_cache import BaseLlamaCache

from ..memory.errors import MemoryRefused

_OTHER_MEMORIES = "the saved state was computed with other memories attached; attach the same ones with the same gains"


class MemoryState:
    """A state saved with memories attached. A plain llama_cpp.Llama refuses it, as it would go on without the memories."""

    def __init__(self, state: LlamaState, key: tuple[int, ...]):
        self._state = state
        self._key = key
        self.input_ids, self.n_tokens, self.llama_state_size = state.input_ids, state.n_tokens, state.llama_state_size

    @property
    def scores(self):
        """Raises MemoryRefused: llama_cpp.Llama.load_state reads this attribute before it changes anything."""
        raise MemoryRefused("the saved state was computed with memories attached; load it in a MemoryLlama with the same ones")


def bind(state: LlamaState, key: tuple[int, ...]) -> LlamaState | MemoryState:
    """The state, tied to the memories that it was computed with; key: see Attachments.key."""
    return MemoryState(state, key) if key else state


def unbind(state: LlamaState | MemoryState, key: tuple[int, ...]) -> LlamaState:
    """The plain state. Raises MemoryRefused if it was computed with other memories than those of the key."""
    if (state._key if isinstance(state, MemoryState) else ()) != key:
        raise MemoryRefused(_OTHER_MEMORIES)
    return state._state if isinstance(state, MemoryState) else state


class CacheByMemory(BaseLlamaCache):
    """A prompt cache that returns only states computed with the attached memories. key: see Attachments.key."""

    def __init__(self, cache: BaseLlamaCache, key: Callable[[], tuple[int, ...]]):
        super().__init__(cache.capacity_bytes)
        # the cache of another MemoryLlama is shared, not wrapped twice
        self.cache: BaseLlamaCache = cache.cache if isinstance(cache, CacheByMemory) else cache
        self.key = key

    @property
    def cache_size(self) -> int:
        return self.cache.cache_size

    def __getitem__(self, tokens: Sequence[int]) -> LlamaState | MemoryState:  # type: ignore[override]
        state = self.cache[(*self.key(), *tokens)]
        try:
            unbind(state, self.key())
        except MemoryRefused as error:
            raise KeyError(str(error)) from None  # the cache matches by common prefix, and keys of other memories may share one
        return state

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return (*self.key(), *tokens) in self.cache

    def __setitem__(self, tokens: Sequence[int], state: LlamaState | MemoryState) -> None:
        self.cache[(*self.key(), *tokens)] = state  # type: ignore[assignment]
