"""Sharing one copy of a model's weights between contexts."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from llama_cpp import Llama
from llama_cpp import _internals as internals
from llama_cpp._internals import LlamaModel


class SharedModel(LlamaModel):
    """A loaded model with a reference count: it is freed when its last user closes it."""

    n_users = 1  # number of contexts that have not closed it

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
