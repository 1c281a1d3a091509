"""The command line, driven as a user would."""

import json
import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from helpers.paths import ROOT
from test_runtime import chat_memory

import attnmem_local.builder.build
from attnmem_local.cli import main
from attnmem_local.cli.common import Number
from attnmem_local.library import DEFAULT_MODEL

HANDBOOK = "Our shop sells tea. Green tea costs 4 euros, black tea costs 3 euros. We open at nine and close at six. " * 3


def attnmem(*args, stdin="", fails=False):
    """What a command prints; what it says on standard error if it fails."""
    done = CliRunner().invoke(main, [*map(str, args)], input=stdin, catch_exceptions=False)
    assert (done.exit_code != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "handbook.md").write_text(HANDBOOK)
    (folder / "chat.json").write_text(json.dumps([{"role": "system", "content": HANDBOOK}]))
    rows = [
        {"text": "Green tea is the best seller of the shop. " * 6},
        {"messages": [{"role": "user", "content": "How much is black tea?"}, {"role": "assistant", "content": "3 euros."}]},
    ]
    (folder / "traces.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "heldout.txt").write_text("When does the shop open? The shop opens at nine. " * 4)
    return folder


@pytest.fixture(scope="module")
def memory(folder):
    """A memory of a chat, built by the command."""
    out = folder / "chat.mem.gguf"
    printed = attnmem(
        "build", "default", folder / "chat.json", "-o", out, "-q", folder / "traces.jsonl", "-q", "repeat", "--share", "1/4"
    )
    assert "KV cache of the prefix" in printed and "fit" in printed
    assert list(folder.glob("*.part")) == []
    return out


def test_show(memory):
    shown = json.loads(attnmem("show", memory, "--json"))
    assert shown["model"]["architecture"] == "llama" and shown["prefix_is_chat"]
    assert "Green tea" in shown["prefix_text"] and shown["prefix_text"].startswith("<|im_start|>system")
    assert 0 < shown["entries"]["anchor"]
    assert shown["bytes"] > 0 and shown["kv_bytes"] == shown["prefix_tokens"] * 30 * 3 * 128 * 2
    assert "tokens of chat" in attnmem("show", memory)


def test_run_and_chat(memory):
    answer = attnmem("run", "default", "-m", memory, "How much is green tea?", "-n", 24).strip()
    assert answer
    assert attnmem("run", "default", "-m", memory, "-", "-n", 24, stdin="How much is green tea?").strip() == answer
    replies = attnmem("chat", "default", "-m", memory, "--temp", 0, stdin="How much is green tea?\n\nAnd black tea?\n")
    assert replies.startswith(answer[:20]) and replies.count("\n") >= 2


def test_the_program_itself(memory):
    program = [sys.executable, "-c", "from attnmem_local.cli import main; main()"]
    done = subprocess.run(
        [*program, "run", "default", "-m", str(memory), "-n", "3", "Count to 100."], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and done.stdout.strip() and "Traceback" not in done.stderr
    assert "the answer was cut" in done.stderr  # an answer in the middle of a sentence says why


def test_eval_fidelity(memory, folder):
    result = json.loads(attnmem("eval", "fidelity", "default", memory, folder / "heldout.txt", "--json"))
    assert set(result) == {"kl_mean", "kl_median", "top1", "nll_full", "nll_memory", "nll_none"}
    assert 0 < result["kl_median"] < result["kl_mean"] and 0 < result["top1"] <= 1
    assert result["nll_full"] < result["nll_none"]


def test_eval_exact(folder):
    result = json.loads(attnmem("eval", "exact", "default", folder / "handbook.md", "-n", 40, "--live", 24, "--json"))
    assert {"kl_mean", "kl_floor", "greedy_equal"} <= set(result)
    assert result["kl_mean"] < 0.02  # the floor of a quantized model is 0.003 on long text; exactness is shown on F32


def test_a_memory_of_text_continues_it(folder):
    attnmem("build", "default", folder / "handbook.md", "-q", folder / "heldout.txt", "--bytes", 400000)
    memory = folder / "handbook.md.mem.gguf"
    assert attnmem("run", "default", "-m", memory, " Green tea", "-n", 4).strip()
    assert "plain text" in attnmem("chat", "default", "-m", memory, stdin="Hi\n", fails=True)


@pytest.fixture
def no_work(monkeypatch):
    """Fails a test whose command begins the work."""
    monkeypatch.setattr(attnmem_local.builder.build, "load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("attnmem_local.runtime.llama.MemoryLlama.__init__", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    "args, says",
    [
        (("build", "nowhere.gguf", "README.md"), "there is no model at"),
        (("build", "default", "nowhere.txt"), "does not exist"),
        (("build", "default", "README.md", "-o", "no/such/folder/x.gguf"), "folder of"),
        (("build", "default", "README.md", "-o", "/proc/x.gguf"), "cannot write into the folder '/proc'"),
        (("build", "default", "README.md", "-o", "/dev/null"), "not a regular file"),
        (("build", "default", "{folder}/handbook.md", "-o", "{folder}/handbook.md"), "would replace"),
        (("build", "default", "README.md", "-q", "self-studdy"), "no file of traces 'self-studdy'"),
        (("build", "default", "README.md", "-q", "{folder}/bad.jsonl"), "line 2"),
        (("build", "default", "README.md", "{folder}/latin1.txt"), "latin1.txt', line 1, byte 0xe9"),
        (("build", "default", "{folder}/bad.JSON"), "not JSON"),
        (("build", "default", "{folder}/empty.md", "--system"), "has no text"),
        (("build", "default", "README.md", "--seed", "-1"), "--seed"),
        (("build", "README.md", "README.md"), "not a GGUF file"),
        (("build", "{memory}", "README.md"), "is a memory; a model is needed here"),
        (("show", "README.md"), "not a GGUF file"),
        (("show", "default"), "does not exist"),
        (("update", DEFAULT_MODEL, "default", "README.md"), "is a model; a memory is needed here"),
        (("run", "default", "-m", "README.md", "Hi"), "not a GGUF file"),
        (("run", "default", "-m", DEFAULT_MODEL, "Hi"), "is a model; a memory is needed here"),
        (("run", "{memory}", "-m", "{memory}", "Hi"), "is a memory; a model is needed here"),
        (("run", "default", "-m", "{memory}", "-c", "-5", "Hi"), "--ctx"),
        (("run", "default", "-m", "{memory}", "-t", "-3", "Hi"), "--threads"),
        (("run", "default", "-m", "{memory}", "--temp", "-1", "Hi"), "--temp"),
        (("run", "default", "-m", "{memory}", "--temp", "nan", "Hi"), "--temp"),
        (("run", "default", "-m", "{memory}", "-n", "0", "Hi"), "--predict"),
        (("run", "default", "-m", "{memory}", os.fsdecode(b"Caf\xe9")), "PROMPT, line 1, byte 0xe9"),
    ],
)
def test_bad_input_is_refused_before_the_work(folder, tiny, no_work, args, says):
    memory = tiny.save(tiny.exact(), "any")
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 3}\n')
    (folder / "latin1.txt").write_bytes("Café".encode("latin-1"))
    (folder / "bad.JSON").write_text("[{")
    (folder / "empty.md").write_text(" \n")
    error = attnmem(*(str(arg).format(folder=folder, memory=memory) for arg in args), fails=True)
    assert says in error and "Traceback" not in error
    assert (folder / "handbook.md").read_text() == HANDBOOK


def test_latin_1_from_a_pipe_is_named(tiny, no_work):
    error = attnmem("run", "default", "-m", tiny.save(tiny.exact(), "any"), "-", stdin="Café".encode("latin-1"), fails=True)
    assert "standard input, line 1, byte 0xe9" in error and "WINDOWS-1252" in error


def test_more_text_than_there_is(folder):
    assert "are needed" in attnmem("eval", "exact", "default", ROOT / "pyproject.toml", "-n", "99999", fails=True)


def test_a_cut_answer_and_a_rounded_context_are_told(tiny, monkeypatch):
    monkeypatch.setattr("llama_cpp.Llama.sample", lambda *_, **__: 700)  # an answer that never ends
    arguments = ["run", str(tiny.path), "-m", str(chat_memory(tiny, "chat")), "-t", "1", "-c"]
    by_limit, by_context = (CliRunner().invoke(main, [*arguments, "64", "-n", n, "Count to 1000."]) for n in ("5", "1000"))
    assert "the context has 256 tokens" in by_limit.stderr and "--predict" in by_limit.stderr and by_limit.exit_code == 0
    assert "the context of 256 tokens is full" in by_context.stderr and by_context.exit_code == 0
    too_long = attnmem(*arguments, "300", "word " * 600, fails=True)
    assert "the context only 512" in too_long and "--ctx" in too_long


@pytest.mark.parametrize("text, value", [("1/16", 1 / 16), ("0.1", 0.1), ("1", 1), (".5e-1", 0.05)])
def test_a_share_is_a_decimal_or_a_fraction(text, value):
    assert Number(0, 1, min_open=True).convert(text, None, None) == value


@pytest.mark.parametrize("text", ["0", "17/16", "-1/16", "1/0", "1/-2", "1/2/3", "nan", "inf", "half", "", "1/"])
def test_what_is_no_share(text):
    with pytest.raises(click.BadParameter):
        Number(0, 1, min_open=True).convert(text, None, None)


def test_loading_a_model_shows_no_bars_of_others(tiny, capfd):
    attnmem_local.builder.build.load_model(tiny.path)
    assert capfd.readouterr() == ("", "")
