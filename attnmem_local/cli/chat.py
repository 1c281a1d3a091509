"""attnmem chat"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..library import MEMORY_SUFFIX
from ..memory.errors import AttnmemError
from ..prompt.texts import decode
from .answer import CtrlC, say_if_cut, write
from .common import (
    ctx_option,
    explain,
    memories_and_model,
    memories_option,
    memory_type,
    model_option,
    say,
    temp_option,
    threads_option,
)

if TYPE_CHECKING:
    from ..conversation import Conversation

HINT = "Ctrl-C stops an answer, Ctrl-D or /bye ends the chat."


@click.command()
@click.argument("memory", type=memory_type, required=False)
@model_option(None)
@memories_option
@temp_option(0.2)
@threads_option
@ctx_option
def chat(memory: Path | None, model: Path | None, more: tuple[Path, ...], temp: float, threads: int | None, ctx: int) -> None:
    """Chat with a memory. Ctrl-C stops an answer, Ctrl-D or /bye ends the chat.

    The chat begins with the prefix of MEMORY, or of the first memory that is given by -M. When standard input is not a
    terminal, each line of it is a message.
    """
    memories, model = memories_and_model(memory, more, model)

    from ..conversation import Conversation, open_llama

    llama = open_llama(model, memories, ctx, threads)
    conversation = Conversation(llama, temp)
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        names = (memory.name.removesuffix(MEMORY_SUFFIX) for memory in memories)
        attached = (f"{name} ({len(a.memory.prefix_tokens)} tokens)" for name, a in zip(names, llama.memories))
        say(f"{model.name} with {', '.join(attached)}. {HINT}")
    has_failed = False
    for message in _typed() if on_terminal else _piped():
        if (command := re.match(r"/[a-z]+(?!\S)", message)) is None:
            has_failed |= not _take(conversation, message.rstrip(), on_terminal)
        elif command[0] in ("/bye", "/exit"):
            break
        elif command[0] == "/help":
            say(HINT)
        else:
            say(f"there is no command {command[0]}; a message that begins with a slash needs a space before it. {HINT}")
    if has_failed and not on_terminal:
        sys.exit(1)


def _take(conversation: "Conversation", message: str, on_terminal: bool) -> bool:
    """Answer a message, and return whether that went well: an error costs this message only.

    Ctrl-C ends an answer on a terminal, and the program in a pipe.
    """
    if not message.strip():
        return True
    try:
        question = decode(message.encode("utf-8", "surrogateescape"), "the message")
        with CtrlC() if on_terminal else nullcontext(CtrlC()) as ctrl_c:
            ctrl_c.answer = conversation.ask(question)
            if n := conversation.n_forgotten:
                oldest = "turn is" if n == 1 else f"{n} turns are"
                n_ctx = conversation.llama.n_ctx()
                say(f"note: the context of {n_ctx} tokens is full, the oldest {oldest} forgotten; a larger --ctx keeps more")
            write(ctrl_c.answer)
        click.echo()
        if ctrl_c.pressed:
            say("stopped")
        elif ctrl_c.answer is not None:
            say_if_cut(ctrl_c.answer, conversation.llama)
    except KeyboardInterrupt:  # before or after the answer itself
        if not on_terminal:
            raise
    except Exception as error:  # whatever it is, the conversation must not be lost
        say(f"error: {explain(error)}" if isinstance(error, (OSError, AttnmemError)) else f"error: {type(error).__name__}: {error}")
        return False
    return True


def _typed() -> Iterator[str]:
    """Messages from a terminal. Pasted text is one message, however many lines it has."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.output import create_output

    session: PromptSession[str] = PromptSession("> ", history=InMemoryHistory(), output=create_output(always_prefer_tty=True))
    while True:
        try:
            message = session.prompt()
        except KeyboardInterrupt:
            say(HINT)
            continue
        except EOFError:
            return
        if message.strip():
            with _keys_wait(session.output):
                yield message


@contextmanager
def _keys_wait(output) -> Iterator[None]:
    """Keys that are typed or pasted while an answer is written wait, unseen, for the next prompt; a paste stays one message."""
    import termios

    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[3] = quiet[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH  # Ctrl-C leaves what waits
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    output.enable_bracketed_paste()
    output.flush()
    try:
        yield
    finally:
        output.disable_bracketed_paste()
        output.flush()
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _piped() -> Iterator[str]:
    for line in iter(sys.stdin.buffer.readline, b""):
        yield line.decode("utf-8", "surrogateescape")
