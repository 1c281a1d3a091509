"""Answers that stream, and conversations that forget their oldest turns when the context is full."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .memory.errors import AttnmemError, BadInput, MemoryRefused, naming
from .runtime.llama import MemoryLlama

OVERHEAD = 8  # tokens of a template around a message, roughly
ROOM = 256  # tokens that are kept free for an answer, or a quarter of the context if that is less

Chunks = Iterator[dict[str, Any]]  # a stream of llama_cpp.Llama, of a chat or of a completion


class TooLong(BadInput):
    """A prompt does not fit into the context."""


def open_llama(model: Path, memories: tuple[Path, ...], n_ctx: int, n_threads: int | None = None) -> MemoryLlama:
    """A model with memories attached. Raises BadInput, which names the file that is wrong."""
    llama = MemoryLlama(str(model), n_ctx=n_ctx, n_threads=n_threads, n_threads_batch=n_threads, verbose=False)
    for path in memories:
        try:
            llama.attach(path)
        except MemoryRefused as error:
            raise naming(error, path) from None
    return llama


class Answer:
    """An answer that is generated while it is read: iterate over its pieces of text.

    text: what has been read so far. end: why the answer ended, None before it did: "stop", the model ended it; "length", it
    reached max_tokens; "full", the context has no room left; "stopped", by stop().
    """

    def __init__(self, llama: MemoryLlama, chunks: Chunks):
        """Runs the prompt. Raises TooLong, and what the stream raises."""
        self.text = ""
        self.end: Literal["stop", "length", "full", "stopped"] | None = None
        self._llama = llama
        self._chunks = chunks
        self._is_stopping = False
        self._next = self._read()

    def __iter__(self) -> Iterator[str]:
        while self._next is not None:
            piece = self._next
            self.text += piece
            yield piece
            if self._is_stopping:
                self._chunks.close()  # type: ignore[attr-defined]
                self._next, self.end = None, "stopped"
            else:
                self._next = self._read()

    def stop(self) -> None:
        """End the answer at its next token."""
        self._is_stopping = True

    def _read(self) -> str | None:
        """The next piece, None at the end."""
        try:
            choice = next(self._chunks)["choices"][0]
        except StopIteration:
            return None
        except AttnmemError:
            raise
        except BaseException as error:
            self._llama.reset()  # the context may hold a token that llama_cpp has not counted
            if isinstance(error, RuntimeError) and "llama_decode" in str(error) and self.text:
                self.end = "full"  # llama_cpp counts no token until its character is whole: such tokens filled the context
                return None
            if isinstance(error, ValueError) and (
                m := re.search(r"Requested tokens \((\d+)\) exceed context window of (\d+)", str(error))
            ):
                raise TooLong(
                    f"the prompt has {m[1]} tokens, the context only {m[2]}; shorten it, or choose a larger --ctx"
                ) from None
            raise
        if choice["finish_reason"] == "length":
            self.end = "length" if self._llama.n_tokens + 1 < self._llama.n_ctx() else "full"
        elif choice["finish_reason"] is not None:
            self.end = "stop"
        return choice["text"] if "text" in choice else choice["delta"].get("content") or ""


def answer(llama: MemoryLlama, prompt: str, max_tokens: int, temperature: float) -> Answer:
    """The answer to a user's message, or how a text goes on, depending on whether the first memory is of a chat or of a text."""
    if llama.memories[0].memory.prefix_messages is None:
        chunks = llama.create_completion(prompt, stream=True, max_tokens=max_tokens, temperature=temperature)
    else:
        messages = [{"role": "user", "content": prompt}]
        chunks = llama.create_chat_completion(messages, stream=True, max_tokens=max_tokens, temperature=temperature)
    return Answer(llama, chunks)


class Turn(NamedTuple):
    question: str
    answer: Answer


class Conversation:
    """A chat that begins with the prefix of the first memory."""

    def __init__(self, llama: MemoryLlama, temperature: float):
        """Raises MemoryRefused if that memory was built from plain text."""
        leader = llama.memories[0].memory
        if leader.prefix_messages is None:
            raise MemoryRefused(
                f"'{leader.path}' was built from plain text, which no chat begins with; "
                "build it from chat messages or with --system, or let `attnmem run` go on with the text"
            )
        self.llama = llama
        self.temperature = temperature
        self.turns: list[Turn] = []
        self.n_forgotten = 0  # turns that were forgotten for the last question

    def ask(self, question: str) -> Answer:
        """The answer to the next question. The oldest turns are forgotten as far as the context has no room for them.

        An error leaves the turns as they were. Raises TooLong for a question that does not fit alone.
        """
        said = [turn for turn in self.turns if turn.answer.text]
        kept = self._fitting(said, question)
        while True:
            try:
                chunks = self.llama.create_chat_completion(_messages(kept, question), stream=True, temperature=self.temperature)
                new = Answer(self.llama, chunks)
                break
            except TooLong:
                if not kept:
                    raise
                kept = kept[1:]  # the sizes are rough
        self.turns = [*kept, Turn(question, new)]
        self.n_forgotten = len(said) - len(kept)
        return new

    def _fitting(self, turns: list[Turn], question: str) -> list[Turn]:
        """The latest turns that leave room for the question and its answer."""
        left = self.llama.n_ctx() - min(ROOM, self.llama.n_ctx() // 4) - self._size(question)
        for i, turn in reversed(list(enumerate(turns))):
            left -= self._size(turn.question) + self._size(turn.answer.text)
            if left < 0:
                return turns[i + 1 :]
        return turns

    def _size(self, text: str) -> int:
        return len(self.llama.tokenize(text.encode(), add_bos=False)) + OVERHEAD


def _messages(turns: list[Turn], question: str) -> list[dict[str, str]]:
    said = [(turn.question, turn.answer.text) for turn in turns]
    messages = [{"role": role, "content": text} for turn in said for role, text in zip(("user", "assistant"), turn)]
    return [*messages, {"role": "user", "content": question}]
