"""The model that run and chat talk to, and its answers as they are written."""

import re
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import click

from ..memory.errors import BadInput, MemoryRefused
from .common import say
from .terminal import printable


class TooLong(BadInput):
    """A prompt does not fit into the context."""


def open_llama(model: Path, memories: tuple[Path, ...], ctx: int, threads: int | None):
    """A MemoryLlama with memories attached. Errors name the file."""
    from ..runtime.llama import MemoryLlama

    try:
        llama = MemoryLlama(str(model), n_ctx=ctx, n_threads=threads, n_threads_batch=threads, verbose=False)
    except ValueError as error:
        if "llama_context" in str(error):
            raise BadInput(f"there is no room for a context of {ctx} tokens; choose a smaller --ctx") from None
        raise BadInput(f"the model '{model}' cannot be loaded: it is damaged, or not known to this llama.cpp") from None
    for path in memories:
        try:
            llama.attach(path)
        except MemoryRefused as error:
            raise type(error)(str(error) if str(path) in str(error) else f"'{path}': {error}") from None
    return llama


class Answer:
    """An answer, written to standard output as it comes.

    text: what was written so far. stopped: Ctrl-C ended it. reason: what else did, "stop" or "length".
    """

    def __init__(self, llama):
        self.llama = llama
        self.text = ""
        self.stopped = False
        self.reason: str | None = None
        self.full = False  # the context, whatever the model counts

    def write(self, chunks) -> None:
        """Write a stream of chunks of a chat or of a completion. Raises TooLong, and what the stream raises."""
        on_terminal = sys.stdout.isatty()
        try:
            for chunk in chunks:
                choice = chunk["choices"][0]
                piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                self.text += piece
                self.reason = choice["finish_reason"]
                click.echo(printable(piece) if on_terminal else piece, nl=False)
                if self.stopped:
                    chunks.close()
                    break
        except ValueError as error:
            if found := re.search(r"Requested tokens \((\d+)\) exceed context window of (\d+)", str(error)):
                n, room = found.groups()
                raise TooLong(f"the prompt has {n} tokens, the context only {room}; shorten it, or choose a larger --ctx") from None
            raise
        except RuntimeError as error:
            if "llama_decode" not in str(error) or not self.text:
                raise
            self.llama.reset()  # tokens that are no whole character are not counted: they have filled the context
            self.reason, self.full = "length", True

    @contextmanager
    def stoppable(self):
        """Ctrl-C stops the answer at the next token, or at once while none has come.

        An exception between two tokens would leave the model with a token that its bookkeeping does not know.
        """

        def stop(signum, frame):
            if self.stopped or not self.text:
                raise KeyboardInterrupt
            self.stopped = True

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        except KeyboardInterrupt:
            self.stopped = True
            self.llama.reset()
        finally:
            signal.signal(signal.SIGINT, before)

    def say_if_cut(self) -> None:
        if self.reason != "length" or self.stopped:
            return
        if not self.full and self.llama.n_tokens + 1 < self.llama.n_ctx():
            say("note: the answer was cut, it has as many tokens as --predict allows")
        else:
            say(f"note: the answer was cut, the context of {self.llama.n_ctx()} tokens is full; a larger --ctx has more room")
