"""The command line, driven as a user would."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

ATTNMEM = [sys.executable, "-c", "from attnmem_local.cli import main; main()"]
HANDBOOK = "Our shop sells tea. Green tea costs 4 euros, black tea costs 3 euros. We open at nine and close at six. " * 3


def attnmem(*args, stdin="", fails=False):
    done = subprocess.run([*ATTNMEM, *map(str, args)], input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "handbook.md").write_text(HANDBOOK)
    (folder / "chat.json").write_text(json.dumps([{"role": "system", "content": HANDBOOK}]))
    rows = [{"text": "Green tea is the best seller of the shop. " * 6}, {"messages": [{"role": "user", "content": "How much is black tea?"}, {"role": "assistant", "content": "3 euros."}]}]
    (folder / "traces.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "heldout.txt").write_text("When does the shop open? The shop opens at nine. " * 4)
    return folder


@pytest.fixture(scope="module")
def memory(folder):
    """A memory of a chat, built by the command."""
    out = folder / "chat.mem.gguf"
    printed = attnmem("build", "default", folder / "chat.json", "-o", out, "-q", folder / "traces.jsonl", "-q", "repeat", "--share", 0.25)
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
    replies = attnmem("chat", "default", "-m", memory, "--temp", 0, stdin="How much is green tea?\nAnd black tea?\n\n")
    assert replies.count("> ") == 3 and answer[:20] in replies


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


@pytest.mark.parametrize(
    "args, says",
    [
        (("build", "nowhere.gguf", "README.md"), "there is no model at"),
        (("build", "default", "nowhere.txt"), "does not exist"),
        (("build", "default", "README.md", "-o", "no/such/folder/x.gguf"), "folder of"),
        (("show", "README.md"), "not a GGUF file"),
        (("run", "default", "-m", "README.md", "Hi"), "not a GGUF file"),
        (("eval", "exact", "default", "pyproject.toml", "-n", "99999"), "are needed"),
    ],
)
def test_bad_input_is_one_line(args, says):
    error = attnmem(*args, fails=True)
    assert says in error and "Traceback" not in error


def test_bad_traces(folder):
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 3}\n')
    error = attnmem("build", "default", folder / "handbook.md", "-q", folder / "bad.jsonl", "-o", folder / "never.gguf", fails=True)
    assert "line 2" in error and "Traceback" not in error
    assert not (folder / "never.gguf").exists()
