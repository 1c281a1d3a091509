"""The command line, driven as a user would: on a library whose default model is tiny."""

import json
import os
import shlex
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
from attnmem_local.memory.memory import Memory

pytestmark = pytest.mark.usefixtures("one_thread")

HANDBOOK = "Our shop sells tea. Green tea costs 4 euros, black tea costs 3 euros. We open at nine and close at six. " * 3
FIDELITY = {"kl_mean", "kl_median", "top1", "nll_full", "nll_memory", "nll_none"}


def attnmem(*args, stdin="", fails=False):
    """What a command prints; what it says on standard error if it fails."""
    done = CliRunner().invoke(main, [*map(str, args)], input=stdin, catch_exceptions=False)
    assert (done.exit_code != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "handbook.md").write_text(HANDBOOK)
    (folder / "hours.md").write_text("We open at eight on Mondays. " * 4)
    (folder / "chat.json").write_text(json.dumps([{"role": "system", "content": HANDBOOK}]))
    rows = [
        {"text": "Green tea is the best seller of the shop. " * 6},
        {"messages": [{"role": "user", "content": "How much is black tea?"}, {"role": "assistant", "content": "3 euros."}]},
    ]
    (folder / "traces.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "heldout.txt").write_text("When does the shop open? The shop opens at nine. " * 4)
    return folder


@pytest.fixture(scope="module", autouse=True)
def home(tiny, tmp_path_factory):
    """The library."""
    home = tmp_path_factory.mktemp("library")
    (home / "models").mkdir()
    (home / "models" / DEFAULT_MODEL.name).symlink_to(tiny.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTNMEM_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def memory(folder, home):
    """The name of a memory of a chat, built by the command."""
    printed = attnmem("build", folder / "chat.json", "-o", "shop", "-q", folder / "traces.jsonl", "-q", "repeat", "--share", "1/2")
    assert "KV cache of the prefix" in printed and "fit" in printed
    assert printed.endswith("\nuse it: attnmem chat shop\n")
    assert os.listdir(home / "memories") == ["shop.mem.gguf"]
    return "shop"


def test_show(memory):
    shown = json.loads(attnmem("show", memory, "--json"))
    assert shown["model"]["architecture"] == "llama" and shown["prefix_is_chat"]
    assert shown["build"]["model"] == DEFAULT_MODEL.name
    assert "Green tea" in shown["prefix_text"] and shown["prefix_text"].startswith("<|im_start|>system")
    assert 0 < shown["entries"]["anchor"]
    assert shown["bytes"] > 0 and shown["kv_bytes"] == shown["prefix_tokens"] * 3 * 2 * 32 * 2
    assert "tokens of chat" in attnmem("show", memory)


def test_list(memory, home):
    printed = attnmem("list")
    assert memory in printed and DEFAULT_MODEL.name in printed
    listed = json.loads(attnmem("list", "--json"))
    assert [(m["name"], m["model"]) for m in listed["memories"]] == [(memory, DEFAULT_MODEL.name)]
    assert listed["memories"][0]["n_prefix_tokens"] == len(Memory.load(home / "memories/shop.mem.gguf").prefix_tokens)
    assert str(home / "models" / DEFAULT_MODEL.name) in listed["models"]


def test_a_damaged_memory_is_listed_as_a_warning(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNMEM_HOME", str(tmp_path))
    assert "no memories yet" in attnmem("list")
    (tmp_path / "memories").mkdir()
    (tmp_path / "memories/half.mem.gguf").write_bytes(b"GGUF")
    done = CliRunner().invoke(main, ["list"])
    assert done.exit_code == 0 and "warning" in done.stderr and "half.mem.gguf" in done.stderr


def test_run_and_chat(memory, home, monkeypatch):
    question = "How much is green tea?"
    answer = attnmem("run", memory, question, "-t", 1, "-n", 24)
    assert answer.strip()
    file = home / "memories/shop.mem.gguf"
    for args in ((file, question), (memory, "-"), ("-M", memory, question), (memory, question, "-m", "default")):
        assert attnmem("run", *args, "-t", 1, "-n", 24, stdin=question) == answer
    monkeypatch.setattr("llama_cpp.Llama.sample", lambda *_, **__: 700)  # the tiny model writes bytes that are no text
    chats = [("chat", memory), ("chat", "-M", memory, "-m", "default")]
    one, other = (attnmem(*args, "-c", 256, "-t", 1, stdin=f"{question}\n\nAnd black tea?\n") for args in chats)
    assert one == other and len(one.splitlines()) == 2


def test_two_memories(memory, folder):
    attnmem("build", folder / "hours.md", "--system", "-q", "repeat", "--share", "1/2")  # its name is that of the file
    question = "When do you open?"
    both = attnmem("run", memory, "-M", "hours", question, "-t", 1, "-n", 24)
    assert both == attnmem("run", "-M", memory, "-M", "hours", question, "-t", 1, "-n", 24)
    assert both != attnmem("run", memory, question, "-t", 1, "-n", 24)


def test_a_memory_of_text_continues_it(folder):
    out = folder / "text.mem.gguf"
    printed = attnmem("build", folder / "handbook.md", "-q", folder / "heldout.txt", "--share", "1/2", "-o", out)
    assert printed.endswith(f"use it: attnmem run {out} PROMPT\n")
    assert attnmem("run", out, " Green tea", "-t", 1, "-n", 4).strip()
    assert "plain text" in attnmem("chat", out, stdin="Hi\n", fails=True)


def test_update(folder, home):
    one, two = folder / "one.md", folder / "two.md"
    one.write_text("Green tea costs 4 euros. " * 6)
    two.write_text("We open at nine. " * 8)
    assert attnmem("build", one, two, "-q", folder / "heldout.txt", "--share", "1/2").endswith("attnmem run one PROMPT\n")
    before = Memory.load(home / "memories/one.mem.gguf")
    two.write_text("We open at noon. " * 8)
    printed = attnmem("update", "one", one, two, "-q", folder / "heldout.txt", "-o", "changed")
    assert "KV cache of the prefix" in printed
    after = Memory.load(home / "memories/changed.mem.gguf")
    assert "noon" in after.prefix_text and "noon" not in before.prefix_text
    assert after.build["model"] == DEFAULT_MODEL.name
    assert (after.layers[0][1].anchor.key == before.layers[0][1].anchor.key).all()
    assert "no part of the prefix has changed" in attnmem("update", "changed", one, two, fails=True)


def test_a_build_replaces_a_memory_only_if_it_is_named(folder, home, no_work):
    kept = home / "memories/handbook.mem.gguf"
    kept.write_bytes(b"a memory of another handbook.md")
    says = attnmem("build", folder / "handbook.md", fails=True)
    assert "`-o handbook` replaces it" in says and kept.read_bytes() == b"a memory of another handbook.md"
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        attnmem("build", folder / "handbook.md", "-o", "handbook")
    kept.unlink()


def test_a_model_of_any_folder_is_found_again(tiny, folder, home):
    model = folder / "mine.gguf"
    model.write_bytes(tiny.path.read_bytes())
    args = ("build", folder / "hours.md", "-m", model, "-q", "repeat", "--share", "1/2", "-o")
    assert attnmem(*args, "mine").endswith("use it: attnmem run mine PROMPT\n")
    assert attnmem("run", "mine", "Hi", "-t", 1, "-n", 2)
    (home / "models/mine.gguf").unlink()
    (home / "models/mine.gguf").symlink_to(DEFAULT_MODEL)  # another model with that name: it stays
    assert attnmem(*args, "mine").endswith(f"use it: attnmem run mine -m {model} PROMPT\n")
    (home / "models/mine.gguf").unlink()


def test_eval_fidelity(memory, folder):
    result = json.loads(attnmem("eval", "fidelity", memory, folder / "heldout.txt", "--json", "-t", 1, "--kv-type", "f32"))
    assert set(result) == FIDELITY and 0 < result["kl_mean"] and 0 <= result["top1"] <= 1
    log = attnmem("eval", "fidelity", memory, folder / "traces.jsonl", "-t", 1, "--window", 32)
    assert all(name in log for name in FIDELITY)


def test_eval_exact(folder):
    result = json.loads(attnmem("eval", "exact", folder / "handbook.md", "-n", 40, "--live", 24, "--json"))
    assert {"kl_mean", "kl_floor", "greedy_equal"} <= set(result)
    assert result["kl_mean"] < 1e-5 and result["greedy_equal"]


def test_a_quantized_cache_needs_flash_attention(folder):
    args = ("eval", "exact", folder / "handbook.md", "--kv-type", "q8_0", "--flash-attn", "off")
    assert "needs flash attention" in attnmem(*args, fails=True)


@pytest.mark.slow
def test_the_real_model_knows_what_its_memory_says(folder, home, monkeypatch, tmp_path):
    monkeypatch.setenv("ATTNMEM_HOME", str(tmp_path))
    monkeypatch.chdir(folder)
    attnmem("build", "handbook.md", "--system", "-q", "traces.jsonl", "-q", "repeat", "--share", "1/4")
    result = json.loads(attnmem("eval", "fidelity", "handbook", "heldout.txt", "--json"))
    assert 0 < result["kl_median"] < result["kl_mean"] and 0 < result["top1"] <= 1
    assert result["nll_full"] < result["nll_none"]
    program = [sys.executable, "-c", "from attnmem_local.cli import main; main()"]
    done = subprocess.run([*program, "run", "handbook", "-n", "3", "Count to 100."], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.strip() and "Traceback" not in done.stderr
    assert "the answer was cut short" in done.stderr  # an answer in the middle of a sentence says why


@pytest.fixture
def no_work(monkeypatch):
    """Fails a test whose command begins the work."""
    monkeypatch.setattr(attnmem_local.builder.build, "load_model", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("attnmem_local.runtime.llama.MemoryLlama.__init__", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    "command, says",
    [
        ("build README.md -m nowhere.gguf", "there is no model 'nowhere.gguf'"),
        ("build README.md -m no/where.gguf", "there is no model at 'no/where.gguf'"),
        ("build nowhere.txt", "does not exist"),
        ("build README.md -o no/such/folder/x.gguf", "folder of"),
        ("build README.md -o /proc/x.gguf", "cannot write into the folder '/proc'"),
        ("build README.md -o /dev/null", "not a regular file"),
        ("build /dev/null", "name the memory by -o"),
        ("build README.md -o ''", "is empty"),
        ("build {folder}/handbook.md -o {folder}/handbook.md", "would replace"),
        ("build README.md -q self-studdy", "no file of traces 'self-studdy'"),
        ("build README.md -q {folder}/bad.jsonl", "line 2"),
        ("build README.md {folder}/latin1.txt", "latin1.txt', line 1, byte 0xe9"),
        ("build {folder}/bad.JSON", "not JSON"),
        ("build {folder}/empty.md --system", "has no text"),
        ("build README.md --seed -1", "--seed"),
        ("build README.md -m README.md", "not a GGUF file"),
        ("build README.md -m {memory}", "is a memory; a model is needed here"),
        ("build {memory}", "is a memory; text is needed here"),
        ("show README.md", "not a GGUF file"),
        ("show {model}", "is a model; a memory is needed here"),
        ("show nothing", "there is no memory 'nothing', neither here nor in"),
        ("run README.md Hi", "not a GGUF file"),
        ("run -M {model} Hi", "is a model, which is given by -m"),
        ("run {memory} -c -5 Hi", "--ctx"),
        ("run {memory} -t -3 Hi", "--threads"),
        ("run {memory} --temp -1 Hi", "--temp"),
        ("run {memory} --temp nan Hi", "--temp"),
        ("run {memory} -n 0 Hi", "--predict"),
        ("run {memory} '" + os.fsdecode(b"Caf\xe9") + "'", "PROMPT, line 1, byte 0xe9"),
        ("run {memory} Hi", "does not say which model it was built for; give the model by -m"),
        ("run {memory}", "a memory and a prompt are needed"),
        ("run {memory} When do we open?", "put the prompt in quotes"),
        ("run", "no prompt"),
        ("chat", "no memory is given"),
        # the form of earlier versions
        ("run default -m {memory} Hi", "is a memory, which comes first: attnmem run {memory} PROMPT"),
        ("run default Hi", "'default' is a model, which is given by -m: attnmem run MEMORY PROMPT -m default"),
        ("chat default -m {memory}", "is a memory, which comes first: attnmem chat {memory}"),
        ("build default README.md", "'default' is a model, which is given by -m: attnmem build PREFIX... -m default"),
        ("build {model} README.md", "attnmem build PREFIX... -m {model}"),
        ("update {memory} default README.md", "attnmem update MEMORY PREFIX... -m default"),
        ("update {model} README.md", "attnmem update MEMORY PREFIX... -m {model}"),
        ("eval exact default README.md", "attnmem eval exact PREFIX -m default"),
        ("eval fidelity default {memory} README.md", "attnmem eval fidelity MEMORY TEXT -m default"),
    ],
)
def test_bad_input_is_refused_before_the_work(folder, tiny, no_work, monkeypatch, command, says):
    monkeypatch.chdir(ROOT)
    names = {"folder": folder, "memory": tiny.save(tiny.exact(), "any"), "model": tiny.path}
    (folder / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 3}\n')
    (folder / "latin1.txt").write_bytes("Café".encode("latin-1"))
    (folder / "bad.JSON").write_text("[{")
    (folder / "empty.md").write_text(" \n")
    error = attnmem(*shlex.split(command.format(**names)), fails=True)
    assert says.format(**names) in error and "Traceback" not in error
    assert (folder / "handbook.md").read_text() == HANDBOOK


def test_latin_1_from_a_pipe_is_named(tiny, no_work):
    memory = tiny.save(tiny.exact(), "any")
    error = attnmem("run", memory, "-", "-m", tiny.path, stdin="Café".encode("latin-1"), fails=True)
    assert "standard input, line 1, byte 0xe9" in error and "WINDOWS-1252" in error


def test_a_prefix_that_is_too_short_for_its_options():
    assert "need 100383" in attnmem("eval", "exact", ROOT / "pyproject.toml", "-n", "99999", fails=True)


def test_a_cut_answer_and_a_rounded_context_are_told(tiny, monkeypatch):
    monkeypatch.setattr("llama_cpp.Llama.sample", lambda *_, **__: 700)  # an answer that never ends
    arguments = ["run", str(chat_memory(tiny, "chat")), "-m", str(tiny.path), "-t", "1", "-c"]
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
