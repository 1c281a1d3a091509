"""Records: what a command measured, with the date, the hardware and the versions; one JSON file per claim.

    {"claim": name, "runs": [{"date", "command", "hardware", "versions", "rows": [{...}, ...], ...}, ...]}

A row that is measured again on the same hardware replaces the old one, so a claim may be measured in parts.
"""

import json
import os
import platform
import re
import shlex
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from .paths import BUILD, RESULTS, ROOT

PACKAGES = ("attnmem-local", "llama-cpp-python", "torch", "transformers")
REQUIRED = {"date": str, "command": str, "hardware": str, "versions": dict, "rows": list}


def options(command):
    """--quick and --record, which every command has; passed on as quick and keep."""
    command = click.option("--record", "keep", is_flag=True, help="Write the result to bench/results/.")(command)
    return click.option("--quick", is_flag=True, help="A small size that shows only whether the command works.")(command)


def write(claim: str, rows: list[dict], *, key: tuple[str, ...], quick: bool, keep: bool, **about) -> Path:
    """Add a run to the record of a claim in bench/results/ (keep) or build/bench/. Returns the file's path.

    key: the fields that tell what a row measures. about: further fields of the run, such as threads.
    Raises click.UsageError for a quick run that is to be kept.
    """
    if quick and keep:
        raise click.UsageError("--quick measures nothing worth a record; leave out --quick or --record")
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    run = {"date": date.today().isoformat(), "command": command, "hardware": hardware(), "versions": versions(), **about}
    path = (RESULTS if keep else BUILD) / f"{claim}{'.quick' if quick else ''}.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    return save(path, claim, [*without(runs, run["hardware"], rows, key), {**run, "rows": rows}])


def save(path: Path, claim: str, runs: list[dict]) -> Path:
    path.write_text(json.dumps({"claim": claim, "runs": runs}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def without(runs: list[dict], where: str, rows: list[dict], key: tuple[str, ...]) -> list[dict]:
    """Earlier runs without the rows that `rows` measure again on the hardware `where`; runs without rows are left out."""
    new = {tuple(row.get(name) for name in key) for row in rows}
    kept = []
    for run in runs:
        old = [r for r in run["rows"] if run["hardware"] != where or tuple(r.get(name) for name in key) not in new]
        if old:
            kept.append(run | {"rows": old})
    return kept


def read(path: Path) -> dict:
    """A record. Raises ValueError, which says what is wrong with the file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("claim") != path.stem:
        raise ValueError(f"{path.name} is the record of the claim '{content.get('claim')}'; it must have the name of its claim")
    if not content.get("runs"):
        raise ValueError(f"{path.name} has no runs")
    for run in content["runs"]:
        for name, kind in REQUIRED.items():
            if not isinstance(run.get(name), kind) or not run[name]:
                raise ValueError(f"{path.name}: a run has no {name}")
        date.fromisoformat(run["date"])
        if not all(isinstance(row, dict) and row for row in run["rows"]):
            raise ValueError(f"{path.name}: a row is not an object with fields")
    return content


def hardware() -> str:
    """CPU, number of cores, and the instructions that the runtime was compiled for."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = names[0] if names else cpu
    return f"{cpu}, {os.cpu_count()} cores, llama.cpp compiled for {instructions()}"


def instructions() -> str:
    """The widest vector instructions that the runtime was compiled for: times depend on them."""
    import llama_cpp

    info = llama_cpp.llama_print_system_info().decode()
    return next((name.lower() for name in ("AVX512", "AVX2", "NEON") if f"{name} = 1" in info), "scalar")


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    known = {}
    for name in PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def finish(claim: str, rows: list[dict], table: Table | None = None, **options) -> None:
    """The end of a command: a table of its rows, the record, and where that is. options: see write."""
    path = write(claim, rows, **options)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table or plain_table(rows))
    console.print(f"written to {path.relative_to(ROOT)}", style="dim")


def plain_table(rows: list[dict]) -> Table:
    """A column per field, a line per row."""
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, (dict, list))))
    table = Table(*(name.replace("_", " ") for name in names))
    for row in rows:
        table.add_row(*(_text(row.get(name)) for name in names))
    return table


def _text(value) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
