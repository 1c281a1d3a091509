"""attnmem chat"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import click

from ..memory.errors import AttnmemError, MemoryRefused
from ..prompt.texts import decode
from .answer import Answer, TooLong, open_llama
from .common import ctx_option, memory_option, model_argument, say, temp_option, threads_option

HINT = "Ctrl-C stops an answer, Ctrl-D or /bye ends the chat."
OVERHEAD = 8  # tokens of a template around a message, roughly
ROOM = 256  # tokens that are kept free for an answer, if a quarter of the context is not less


@click.command()
@model_argument
@memory_option
@temp_option(0.2)
@threads_option
@ctx_option
def chat(model: Path, memories: tuple[Path, ...], temp: float, threads: int | None, ctx: int) -> None:
    """Chat with memories attached. Ctrl-C stops an answer, Ctrl-D or /bye ends the chat.

    When standard input is not a terminal, each line of it is a message.
    """
    llama = open_llama(model, memories, ctx, threads)
    leader = llama.memories[0].memory
    if leader.prefix_messages is None:
        raise MemoryRefused(
            f"'{leader.path}' was built from plain text, which no chat begins with; "
            "build it from chat messages or with --system, or let attnmem run go on with the text"
        )
    on_terminal = sys.stdin.isatty()
    conversation = Conversation(llama, temp, on_terminal)
    if on_terminal:
        attached = (f"{a.memory.path.name} ({len(a.memory.prefix_tokens)} tokens)" for a in llama.memories)
        say(f"{model.name} with {', '.join(attached)}. {HINT}")
    for message in _typed() if on_terminal else _piped():
        if (command := re.match(r"/[a-z]+(?!\S)", message)) is None:
            conversation.take(message.rstrip())
        elif command[0] in ("/bye", "/exit"):
            break
        elif command[0] == "/help":
            say(HINT)
        else:
            say(f"there is no command {command[0]}; a message that begins with a slash needs a space before it. {HINT}")
    if conversation.failed and not on_terminal:
        sys.exit(1)


def _typed() -> Iterator[str]:
    """Messages from a terminal. Pasted text is one message, however many lines it has."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.output import create_output

    session = PromptSession("> ", history=InMemoryHistory(), output=create_output(always_prefer_tty=True))
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
    """What is typed or pasted while an answer is written waits for the next prompt, unseen; a paste stays one message."""
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


class Turn(NamedTuple):
    question: str
    answer: str
    n_tokens: int  # of both, roughly


class Conversation:
    """What was said so far, as much of it as fits into the context."""

    def __init__(self, llama, temperature: float, on_terminal: bool):
        self.llama = llama
        self.temperature = temperature
        self.on_terminal = on_terminal  # Ctrl-C there ends an answer only, in a pipe it ends the program
        self.turns: list[Turn] = []
        self.failed = False  # a message had no answer

    def take(self, message: str) -> None:
        """Answer a message. An error costs this message only."""
        if not message.strip():
            return
        try:
            self._answer(decode(message.encode("utf-8", "surrogateescape"), "the message"))
        except KeyboardInterrupt:  # before or after the answer itself
            if not self.on_terminal:
                raise
            self.llama.reset()
        except Exception as error:  # whatever it is, the conversation must not be lost
            self.llama.reset()
            self.failed = True
            say(f"error: {error}" if isinstance(error, (OSError, AttnmemError)) else f"error: {type(error).__name__}: {error}")

    def _answer(self, question: str) -> None:
        n_tokens = self._size(question)
        room = min(ROOM, self.llama.n_ctx() // 4)
        fitting = self.llama.n_ctx() - n_tokens - room
        self._drop(next(i for i in range(len(self.turns) + 1) if sum(t.n_tokens for t in self.turns[i:]) <= max(fitting, 0)))
        answer = Answer(self.llama)
        with answer.stoppable() if self.on_terminal else nullcontext():
            while True:
                try:
                    answer.write(
                        self.llama.create_chat_completion(self._messages(question), stream=True, temperature=self.temperature)
                    )
                    break
                except TooLong:
                    if not self.turns:
                        raise
                    self._drop(1)  # the sizes are rough
        click.echo()
        if answer.stopped:
            say("stopped")
        answer.say_if_cut()
        if answer.text:
            self.turns.append(Turn(question, answer.text, n_tokens + self._size(answer.text)))

    def _size(self, text: str) -> int:
        return len(self.llama.tokenize(text.encode(), add_bos=False)) + OVERHEAD

    def _drop(self, n: int) -> None:
        if n:
            del self.turns[:n]
            oldest = "turn is" if n == 1 else f"{n} turns are"
            say(
                f"note: the context of {self.llama.n_ctx()} tokens is full, the oldest {oldest} forgotten; a larger --ctx keeps more"
            )

    def _messages(self, question: str) -> list[dict]:
        said = [(t.question, t.answer) for t in self.turns]
        messages = [{"role": role, "content": text} for turn in said for role, text in zip(("user", "assistant"), turn)]
        return [*messages, {"role": "user", "content": question}]
