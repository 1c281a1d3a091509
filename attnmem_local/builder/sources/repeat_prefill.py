"""Repeat-prefill: the prefix itself, as if the model were asked to repeat it (KVzip, arXiv 2505.23416)."""

from typing import TYPE_CHECKING

from ...memory.prefix import Prefix
from . import WINDOW

if TYPE_CHECKING:
    from ..job import Build


class RepeatPrefill:
    is_real = False
    written = (0, 0)

    def __init__(self, query: str, build: "Build"):
        self.name = query
        self.n_tokens = len(build.prefix.tokens)

    def windows(self, build: "Build") -> list[list[int]]:
        return repeat_prefill(build.prefix, WINDOW)


def repeat_prefill(prefix: Prefix, window: int) -> list[list[int]]:
    """The prefix in windows of `window` tokens."""
    return [prefix.tokens[i : i + window] for i in range(0, len(prefix.tokens), window)]
