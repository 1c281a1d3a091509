"""Documents and the command line say the same, and help comes at once."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from helpers.paths import ROOT

from attnmem_local.cli import main
from attnmem_local.library import DEFAULT_MODEL

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "models/README.md", *sorted((ROOT / "docs").glob("*.md"))]
USE = re.search(r"^## Use\n(.*?)^## ", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
OF_BUILD_SH = {"--cuda"}
HEAVY = {"torch", "transformers", "llama_cpp", "numpy", "gguf", "rich", "prompt_toolkit", "jinja2"}


def commands(command: click.Command = main, name: str = "attnmem") -> dict[str, click.Command]:
    """The commands that a user can type, by their full names."""
    if not isinstance(command, click.Group):
        return {name: command}
    return {full: c for key, sub in command.commands.items() for full, c in commands(sub, f"{name} {key}").items()}


COMMANDS = commands()
OPTIONS = {option for c in COMMANDS.values() for p in c.params if isinstance(p, click.Option) for option in p.opts} | {
    "--help",
    "--version",
}


def calls(text: str) -> list[str]:
    """The lines of a document's blocks of code that call attnmem."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("attnmem ")]


def mentions(text: str) -> list[str]:
    """What a document says about attnmem in code, in blocks or between backticks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*calls(text), *(code for code in re.findall(r"`([^`\n]+)`", prose) if code.startswith("attnmem "))]


MENTIONS = [(path.name, line) for path in DOCUMENTS for line in mentions(path.read_text(encoding="utf-8"))]


def parse(line: str) -> str:
    """The command of a line. Raises click.UsageError if it has no such option, or takes no such arguments."""
    words = shlex.split(line)
    name = next((n for n in (" ".join(words[:3]), " ".join(words[:2])) if n in COMMANDS), None)
    if name is None:
        raise click.UsageError(f"no such command: {line}")
    command, args = COMMANDS[name], words[len(name.split()) :]
    context = click.Context(command)
    values, left, _ = command.make_parser(context).parse_args(args)
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    given = {p.name: value for p in arguments if isinstance(value := values.get(p.name), (str, tuple)) and value}
    if left or (given and any(p.required and p.name not in given for p in arguments)):  # the bare name of a command is no call
        raise click.UsageError(f"wrong number of arguments: {line}")
    if any("default" in ((value,) if isinstance(value, str) else value) for value in given.values()):
        raise click.UsageError(f"a model is given by -m: {line}")
    return name


@pytest.mark.parametrize("document, line", MENTIONS)
def test_every_command_in_a_document_can_be_typed(document, line):
    parse(line)


@pytest.mark.parametrize(
    "line", ["attnmem nothing", "attnmem build x.md --nothing", "attnmem show a b", "attnmem update a", "attnmem chat default"]
)
def test_what_cannot_be_typed(line):
    with pytest.raises(click.UsageError):
        parse(line)


@pytest.mark.slow
def test_the_commands_of_readme_work(tiny, one_thread, tmp_path, monkeypatch):
    home, model = tmp_path / "home", tmp_path / "models/mine.Q4_K_M.gguf"
    for path in (home / "models" / DEFAULT_MODEL.name, model):
        path.parent.mkdir(parents=True)
        path.symlink_to(tiny.path)
    monkeypatch.setenv("ATTNMEM_HOME", str(home))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("llama_cpp.Llama.sample", lambda llama, **_: llama.token_eos())  # answers of a random model have no end
    monkeypatch.chdir(tmp_path)
    for name in ("handbook.md", "heldout.txt", "intro.md", "rules.md", "prices.md"):
        Path(name).write_text(f"This is {name}: we sell tea, and open at nine. " * (60 if name == "handbook.md" else 10))
    for line in calls(USE):
        if parse(line) == "attnmem update":
            Path("rules.md").write_text("We open at ten, and sell no coffee. " * 10)
        words = [os.path.expanduser(word) for word in shlex.split(line)[1:]]
        done = CliRunner().invoke(main, words, input="Hi\n", catch_exceptions=False)
        assert done.exit_code == 0, f"{line}: {done.stderr}"


def test_readme_shows_every_command():
    shown = {parse(line) for line in calls(USE)}
    assert shown == COMMANDS.keys() - {"attnmem demo"}  # which build.sh runs


@pytest.mark.parametrize("document", ["README.md", "models/README.md", "docs/how-it-works.md", "docs/build-time.md"])
def test_every_option_in_a_document_exists(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    mentioned = {
        option for passage in re.findall(r"`(-[^`\n]*)`", text) for option in re.findall(r"(?<!\S)--?[a-z][a-z-]*", passage)
    }
    assert mentioned - OPTIONS - OF_BUILD_SH == set()


def test_every_parameter_has_a_help_text():
    for name, command in COMMANDS.items():
        assert command.help and len(command.get_short_help_str(45).rstrip(".")) < 45, f"{name}: its first sentence is cut"
        for param in command.params:
            assert not isinstance(param, click.Option) or param.help, f"{name} {param.name}"


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["build", "--help"]])
def test_help_imports_nothing_heavy(args):
    program = f"import sys; from attnmem_local.cli import main; main({args}, 'attnmem', standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: attnmem")
    assert {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()} & HEAVY == set()
