"""attnmem chat, on a terminal and in a pipe, with a tiny model whose answers never end by themselves."""

import json
import os
import re
import sys
import time

import pexpect
import pytest
from click.testing import CliRunner
from test_runtime import chat_memory

from attnmem_local.cli import main
from attnmem_local.cli.chat import Conversation

# attnmem, with answers that never end, and a log of what was asked after how many turns
LISTENING = """
import json, sys
import llama_cpp
from attnmem_local.cli import main
from attnmem_local.cli.chat import Conversation
llama_cpp.Llama.sample = lambda *_, **__: 700
log = open(sys.argv.pop(1), "w", buffering=1)
answer = Conversation._answer
Conversation._answer = lambda self, question: (print(json.dumps([question, len(self.turns)]), file=log), answer(self, question))
main()
"""
TAKES_PASTES = "\x1b[?2004h"  # what a program tells a terminal that is to mark pasted text


@pytest.fixture(scope="module")
def memory(tiny):
    return chat_memory(tiny, "chat")


@pytest.fixture
def asked(monkeypatch):
    """The messages that were answered, in order."""
    found = []
    answer = Conversation._answer

    def _answer(self, question):
        found.append(question)
        return answer(self, question)

    monkeypatch.setattr(Conversation, "_answer", _answer)
    return found


@pytest.fixture
def pipe(tiny, memory, monkeypatch):
    def pipe(text: bytes):
        monkeypatch.setattr("llama_cpp.Llama.sample", lambda *_, **__: 700)
        arguments = ["chat", str(tiny.path), "-m", str(memory), "--temp", "0", "-c", "256", "-t", "1"]
        return CliRunner().invoke(main, arguments, input=text, catch_exceptions=False)

    return pipe


def test_a_full_context_forgets_the_oldest_turns(pipe, asked):
    messages = [f"{name} " * 60 for name in ("one", "two", "red")]
    done = pipe("\n\n   \r\n".join(messages).encode())  # nothing is asked by an empty line
    assert asked == [m.rstrip() for m in messages] and done.exit_code == 0
    assert done.stderr.count("the answer was cut, the context of 256 tokens is full") == 3
    assert done.stderr.count("the oldest turn is forgotten") == 2


def test_an_error_costs_one_message(pipe, asked):
    done = pipe(b"word " * 2000 + b"\nCaf\xe9 please\n" + b"Hi " * 60 + b"\n/nonsense\n/bye\nnever\n")
    assert asked[1:] == ["Hi " * 59 + "Hi"] and done.exit_code == 1
    assert "choose a larger --ctx" in done.stderr and "WINDOWS-1252" in done.stderr and "no command /nonsense" in done.stderr


def test_a_chat_on_a_memory_of_text_is_refused_before_the_first_question(tiny, asked):
    path = tiny.save(tiny.exact(), "text")
    done = CliRunner().invoke(main, ["chat", str(tiny.path), "-m", str(path)], input="Hi\n")
    assert done.exit_code == 1 and "plain text" in done.stderr and asked == []


def test_a_chat_on_a_terminal(tiny, memory, tmp_path):
    log = tmp_path / "asked"
    chat = pexpect.spawn(
        sys.executable,
        ["-c", LISTENING, str(log), "chat", str(tiny.path), "-m", str(memory), "-c", "8192", "-t", "1", "--temp", "0"],
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

    chat.expect("chat.mem.gguf.*/bye ends the chat")
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
    questions = [["Say hi.\n\ntouch owned", 0], ["pasted\n\nmeanwhile", 1], ["last!", 2]]  # each after the turns before it
    assert [json.loads(line) for line in log.read_text().splitlines()] == questions
