"""Sharing one copy of a model's weights between contexts."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from llama_cpp import Llama
from llama_cpp import _internals as internals
from llama_cpp._internals import LlamaContext, LlamaModel


class _Callbacks:
    """What is called before a model is freed, the last one first. llama_cpp adds the close of each context."""

    def __init__(self) -> None:
        self._functions: list[Callable[[], None]] = []

    def callback(self, function: Callable[[], None]) -> None:
        self._functions.append(function)

    def discard(self, function: Callable[[], None]) -> None:
        if function in self._functions:
            self._functions.remove(function)

    def close(self) -> None:
        while self._functions:
            self._functions.pop()()


class SharedModel(LlamaModel):
    """A loaded model with a reference count: it is freed when its last user closes it."""

    n_users = 1  # number of contexts that have not closed it

    def __init__(self, **options):
        super().__init__(**options)
        callbacks: Any = _Callbacks()
        callbacks.callback(self._exit_stack.close)  # frees the model
        self._exit_stack = callbacks

    def forget(self, context: LlamaContext) -> None:
        """Release a closed context, which llama_cpp would hold as long as the model."""
        self._exit_stack.discard(context.close)  # type: ignore[attr-defined]

    def close(self) -> None:
        self.n_users -= 1
        if self.n_users == 0:
            super().close()

    def __del__(self):
        super().close()


_loading = threading.Lock()


@contextmanager
def weights_of(owner: Llama | None) -> Iterator[None]:
    """While active, a Llama created in this thread gets the SharedModel of `owner`, or a new one for None.

    A patch is needed, because Llama has no parameter for a model that is loaded already.
    """
    thread, load = threading.get_ident(), internals.LlamaModel

    def take(**options) -> LlamaModel:
        if threading.get_ident() != thread:
            return load(**options)
        if owner is None:
            return SharedModel(**options)
        model: Any = owner._model
        model.n_users += 1
        return model

    with _loading, patch.object(internals, "LlamaModel", take):
        yield
