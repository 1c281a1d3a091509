"""Conversations, and attnmem chat on a terminal and in a pipe: with a tiny model whose answers never end by themselves."""

import json
import os
import re
import sys
import time

import pexpect
import pytest
from click.testing import CliRunner
from helpers.paths import ROOT
from test_runtime import chat_memory

from attnmem_local.cli import main
from attnmem_local.conversation import Answer, Conversation, TooLong, answer, open_llama
from attnmem_local.memory.errors import BadInput, MemoryRefused

# attnmem, with answers that never end, and a log of what was asked after how many turns
LISTENING = """
import json, sys
import llama_cpp
from attnmem_local.cli import main
from attnmem_local.conversation import Conversation
llama_cpp.Llama.sample = lambda *_, **__: 700
log = open(sys.argv.pop(1), "w", buffering=1)
ask = Conversation.ask
Conversation.ask = lambda self, question: print(json.dumps([question, len(self.turns)]), file=log) or ask(self, question)
main()
"""
TAKES_PASTES = "\x1b[?2004h"  # what a program tells a terminal that is to mark pasted text


@pytest.fixture(scope="module")
def memory(tiny):
    return chat_memory(tiny, "chat")


@pytest.fixture
def questions(monkeypatch):
    """The messages that were answered, in order."""
    asked = []
    ask = Conversation.ask
    monkeypatch.setattr(Conversation, "ask", lambda self, question: asked.append(question) or ask(self, question))
    return asked


@pytest.fixture
def pipe(tiny, memory, monkeypatch):
    def pipe(text: bytes):
        monkeypatch.setattr("llama_cpp.Llama.sample", lambda *_, **__: 700)
        arguments = ["chat", str(memory), "-m", str(tiny.path), "--temp", "0", "-c", "256", "-t", "1"]
        return CliRunner().invoke(main, arguments, input=text, catch_exceptions=False)

    return pipe


@pytest.fixture
def llama(tiny, memory, monkeypatch):
    """A model with a context of 256 tokens whose answers never end."""
    monkeypatch.setattr("llama_cpp.Llama.sample", lambda *_, **__: 700)
    return open_llama(tiny.path, (memory,), 256, 1)


def test_an_answer_is_read_piece_by_piece(llama):
    given = answer(llama, "Count to 100.", 5, 0)
    assert given.end is None and given.text == ""
    pieces = list(given)
    assert "".join(pieces) == given.text and len(list(filter(None, pieces))) == 5 and given.end == "length"
    assert "".join(answer(llama, "Count to 100.", 1000, 0)).startswith(given.text)


def test_how_an_answer_ends(llama, monkeypatch):
    long = answer(llama, "Count to 100.", 1000, 0)
    assert "".join(long) and long.end == "full"
    stopped = answer(llama, "Count to 100.", 1000, 0)
    for piece in stopped:
        if piece:
            stopped.stop()
    assert stopped.text == piece and stopped.end == "stopped"
    monkeypatch.setattr("llama_cpp.Llama.sample", lambda self, **__: self.token_eos())
    ended = answer(llama, "Count to 100.", 1000, 0)
    assert "".join(ended) == "" and ended.end == "stop"


def test_a_memory_of_text_goes_on(tiny, monkeypatch):
    monkeypatch.setattr("llama_cpp.Llama.sample", lambda *_, **__: 700)
    text = open_llama(tiny.path, (tiny.save(tiny.exact(), "text"),), 256, 1)
    given = answer(text, "Once", 3, 0)
    assert "".join(given) and given.end == "length"
    with pytest.raises(MemoryRefused, match="plain text"):
        Conversation(text, 0)


def test_a_conversation_goes_on_after_a_question_that_is_too_long(llama):
    conversation = Conversation(llama, 0)
    first = conversation.ask("one " * 10)
    for piece in first:
        if piece:
            first.stop()
    before = llama.n_tokens
    with pytest.raises(TooLong, match="choose a larger --ctx"):
        conversation.ask("word " * 2000)
    assert [turn.question for turn in conversation.turns] == ["one " * 10]
    conversation.ask("two")
    assert llama.n_tokens > before and conversation.n_forgotten == 0
    assert [turn.question for turn in conversation.turns] == ["one " * 10, "two"]


def test_an_interrupted_answer_leaves_the_model_as_before(llama, monkeypatch):
    conversation = Conversation(llama, 0)
    decode = llama._ctx.decode

    def interrupt(batch):
        decode(batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(llama._ctx, "decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("one")
    monkeypatch.setattr(llama._ctx, "decode", decode)
    assert llama.n_tokens == 0 and conversation.turns == []
    new = conversation.ask("one")
    next(iter(new))
    assert isinstance(new, Answer) and llama.n_tokens > 0


@pytest.mark.parametrize(
    "options, says",
    [
        ({"model": "README.md"}, "cannot be loaded"),
        ({"memories": ("README.md",)}, "README.md': this is not a GGUF file"),
    ],
)
def test_what_cannot_be_opened_is_named(tiny, memory, monkeypatch, options, says):
    monkeypatch.chdir(ROOT)
    with pytest.raises(BadInput, match=says):
        open_llama(**({"model": tiny.path, "memories": (memory,), "n_ctx": 256} | options))


def test_a_context_that_has_no_room(tiny, memory, monkeypatch):
    def __init__(*_, **__):
        raise ValueError("Failed to create llama_context")  # as llama_cpp says

    monkeypatch.setattr("llama_cpp.Llama.__init__", __init__)
    with pytest.raises(BadInput, match="no room for a context of 256 tokens"):
        open_llama(tiny.path, (memory,), 256)


def test_a_full_context_forgets_the_oldest_turns(pipe, questions):
    messages = [f"{name} " * 60 for name in ("one", "two", "red")]
    done = pipe("\n\n   \r\n".join(messages).encode())  # nothing is asked by an empty line
    assert questions == [m.rstrip() for m in messages] and done.exit_code == 0
    assert done.stderr.count("the answer was cut short, the context of 256 tokens is full") == 3
    assert done.stderr.count("the oldest turn is forgotten") == 2


def test_an_error_costs_one_message(pipe, questions):
    done = pipe(b"word " * 2000 + b"\nCaf\xe9 please\n" + b"Hi " * 60 + b"\n/nonsense\n/bye\nnever\n")
    assert questions[1:] == ["Hi " * 59 + "Hi"] and done.exit_code == 1
    assert "choose a larger --ctx" in done.stderr and "WINDOWS-1252" in done.stderr and "no command /nonsense" in done.stderr


def test_a_chat_on_a_memory_of_text_is_refused_before_the_first_question(tiny, questions):
    path = tiny.save(tiny.exact(), "text")
    done = CliRunner().invoke(main, ["chat", str(path), "-m", str(tiny.path)], input="Hi\n")
    assert done.exit_code == 1 and "plain text" in done.stderr and questions == []


@pytest.mark.slow
def test_a_chat_on_a_terminal(tiny, memory, tmp_path):
    log = tmp_path / "asked"
    chat = pexpect.spawn(
        sys.executable,
        ["-c", LISTENING, str(log), "chat", str(memory), "-m", str(tiny.path), "-c", "8192", "-t", "1", "--temp", "0"],
        encoding="utf-8",
        timeout=60,
        env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"},
    )

    def ask(text: str, *, number: int):
        """Ask a question, wait until it is being answered, and stop the answer."""
        chat.send(text + "\r")
        end = time.monotonic() + 60
        while len(log.read_text().splitlines()) < number and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.5)

    chat.expect("llama.gguf with chat .*/bye ends the chat")
    chat.expect(re.escape(TAKES_PASTES))
    chat.send("\x03")  # Ctrl-C at the prompt is a hint
    chat.expect("/bye ends the chat")
    chat.send("\r")  # nothing is asked by an empty line
    ask("\x1b[200~Say hi.\r\rtouch owned\x1b[201~", number=1)
    chat.send("\x1b[200~pasted\r\rmeanwhile\x1b[201~")  # while an answer is written
    chat.send("\x03")
    chat.expect("stopped")
    ask("", number=2)
    chat.send("\x03")
    chat.expect("stopped")
    ask("lat\x1b[Ds\x1b[C!", number=3)  # arrow keys move
    chat.send("\x03")
    chat.expect("stopped")
    chat.send("/bye\r")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    expected = [["Say hi.\n\ntouch owned", 0], ["pasted\n\nmeanwhile", 1], ["last!", 2]]  # each after the turns before it
    assert [json.loads(line) for line in log.read_text().splitlines()] == expected
