"""Query sources, one file each: text that may follow the prefix. Its queries are what a memory is fitted to.

A new source is one more file and one more line in SOURCES; help texts and messages list it from here. Sources are imported
when they are used: the command line names them without loading torch.
"""

from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..job import Build

Query = str | PathLike | list  # a name of SOURCES, a file of traces, or traces

SOURCES = {"repeat": "repeat_prefill.RepeatPrefill", "self-study": "self_study.SelfStudy"}  # name -> module and class
DEFAULT_SOURCES = ("repeat", "self-study")  # without traces
WINDOW = 384  # tokens of existing text in one window


class Source(Protocol):
    """Live text from one source. Making one reads and checks what exists already; it raises BadInput or OSError."""

    name: str  # as the memory file records it
    is_real: bool  # whether people really wrote the text
    n_tokens: int  # of all windows
    written: tuple[int, int]  # windows that the model has yet to write, and the tokens of each; (0, 0) for existing text

    def windows(self, build: "Build") -> list[list[int]]:
        """Token sequences that each follow the prefix on their own."""


def open_source(query: Query, build: "Build") -> Source:
    """The source with a name, or that of traces: the path of a file, or a list of texts, chats or tokens."""
    path = SOURCES[query] if isinstance(query, str) and query in SOURCES else "traces.Traces"
    module, name = path.split(".")
    return getattr(import_module(f".{module}", __name__), name)(query, build)
