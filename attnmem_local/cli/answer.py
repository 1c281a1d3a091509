"""Printing an answer as it comes."""

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

import click

from .common import say
from .terminal import printable

if TYPE_CHECKING:
    from ..conversation import Answer
    from ..runtime.llama import MemoryLlama


def write(answer: "Answer") -> None:
    """Print the pieces of an answer. Raises what its stream raises."""
    on_terminal = sys.stdout.isatty()
    for piece in answer:
        click.echo(printable(piece) if on_terminal else piece, nl=False)


def say_if_cut(answer: "Answer", llama: "MemoryLlama") -> None:
    if answer.end == "length":
        say("note: the answer was cut short, it reached the limit of --predict")
    elif answer.end == "full":
        say(f"note: the answer was cut short, the context of {llama.n_ctx()} tokens is full; a larger --ctx has more room")


class CtrlC:
    """Within it, Ctrl-C stops `answer` at its next token, or at once while it has no text or is stopped already."""

    answer: "Answer | None" = None
    pressed = False

    def __enter__(self) -> "CtrlC":
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, kind: type | None, *_) -> bool:
        signal.signal(signal.SIGINT, self._before)
        return kind is KeyboardInterrupt

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        if self.pressed or self.answer is None or not self.answer.text:
            self.pressed = True
            raise KeyboardInterrupt
        self.pressed = True
        self.answer.stop()
