"""The index of bench and what it names: commands that parse, records that exist and are valid."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.paths import ROOT

sys.path.insert(0, str(ROOT))

from bench.__main__ import COMMANDS, main
from bench.common import record

INDEX = (ROOT / "bench/README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| .+ \| `(?P<command>[^`]+)` \| `(?P<record>results/[^`]+)` \| \d+ \|$", re.MULTILINE)
ROWS = [row.groupdict() for row in ROW.finditer(INDEX)]


def test_every_row_of_the_index_names_a_command_and_a_record():
    assert len(ROWS) == INDEX.count("\n| ") - 1  # the head of the table


def test_every_record_is_named_and_valid():
    named = {ROOT / "bench" / row["record"] for row in ROWS}
    assert named == set((ROOT / "bench/results").iterdir())
    for path in named:
        record.read(path)


@pytest.mark.parametrize("command", sorted({row["command"] for row in ROWS}))
def test_commands_of_the_index_parse(command):
    python, flag, module, *arguments = shlex.split(command)
    assert (python, flag, module) == ("python", "-m", "bench")
    assert CliRunner().invoke(main, [*arguments, "--help"]).exit_code == 0
    assert CliRunner().invoke(main, [*arguments, "--no-such-option", "--help"]).exit_code == 2


def test_commands_of_records_parse():
    for path in (ROOT / "bench/results").iterdir():
        for run in record.read(path)["runs"]:
            arguments = shlex.split(run["command"].removeprefix("python -m bench"))
            assert CliRunner().invoke(main, [*arguments, "--help"]).exit_code == 0, run["command"]


def test_every_command_is_in_the_index():
    commands = {"tasks"} | {f"{group} {name}" for group in ("quality", "speed") for name in COMMANDS[group]}
    indexed = {re.match(r"python -m bench (tasks|\w+ [\w-]+)", row["command"])[1] for row in ROWS}
    assert commands == indexed


@pytest.mark.parametrize("stage", COMMANDS["gpu"])
def test_gpu_stages_are_told_in_their_script(stage):
    assert CliRunner().invoke(main, ["gpu", stage, "--help"]).exit_code == 0
    assert f"bench/gpu.sh {stage} " in (ROOT / "bench/gpu.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_documents_name_files_of_bench_that_exist(document):
    for name in re.findall(r"bench/[\w/.-]+\w", (ROOT / document).read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), name


def run(hardware: str, **kl: float) -> dict:
    rows = [{"method": method, "kl": value} for method, value in kl.items()]
    return {"date": "2026-11-25", "command": "python -m bench", "hardware": hardware, "versions": {"gguf": "1"}, "rows": rows}


def test_rows_measured_again_replace_those_of_the_same_hardware():
    runs = [run("one", a=1.0, b=2.0), run("two", a=3.0), run("one", c=4.0)]
    new = [{"method": "a"}, {"method": "c"}]
    assert record.without(runs, "one", new, ("method",)) == [run("one", b=2.0), run("two", a=3.0)]


def test_a_record_says_what_is_wrong_with_it(tmp_path: Path):
    path = record.save(tmp_path / "claim.json", "claim", [run("one", a=1.0)])
    record.read(path)
    for claim, runs, message in (
        ("other", [run("one", a=1.0)], "'other'"),
        ("claim", [], "no runs"),
        ("claim", [run("", a=1.0)], "no hardware"),
        ("claim", [run("one")], "no rows"),
        ("claim", [run("one", a=1.0) | {"date": "yesterday"}], "yesterday"),
    ):
        with pytest.raises(ValueError, match=message):
            record.read(record.save(path, claim, runs))
