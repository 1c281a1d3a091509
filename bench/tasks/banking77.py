"""Task accuracy of memories and their peers: many-shot intent classification on banking77 (bench/tasks/cases.py has its rules).

The answer of a system is the intent whose label, with the line end after it, is the most probable text after the query; the
same exact search is used for all (bench/common/labels.py). All systems may see the prefix and 500 other labelled training
rows, the traces. A share is of the bytes of the prefix's F16 KV cache. All run the quantized default model in llama.cpp,
except the peers of kvpress: those run its weights as float32 in PyTorch, and are compared with a full prefix there.

Prints accuracy per seed, the mean over all tests with its standard error, and the difference to the full prefix with the
standard error of the paired difference. An interrupted run resumes: finished cells are kept under build/bench/. --fresh
measures the chosen systems again.
"""

import json
import os

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from attnmem_local.engine.tokenizer import GgufTokenizer
from attnmem_local.library import DEFAULT_MODEL

from ..common import record
from ..common.paths import BANKING77
from ..common.scoring import kv_bytes
from ..peers import presses
from .cases import N_TESTS, Case, Classifier, make_case
from .systems import FULL, FULL_PYTORCH, SYSTEMS

SEEDS = 1, 2, 8  # of CANDIDATES, those that --choose-seeds finds to gain most from the full prefix, on other rows
CANDIDATES = range(9)
console = Console(stderr=True)


@click.command(help=__doc__)
@click.option("--system", "systems", multiple=True, type=click.Choice(list(SYSTEMS)), help="[default: all]")
@click.option("--threads", default=os.cpu_count() or 1, show_default=True, help="CPU threads; 1 is best on a busy machine.")
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@click.option("--choose-seeds", is_flag=True, help="Only show which seeds gain most from the full prefix; reads no test row.")
@record.options
def main(systems, threads: int, fresh: bool, choose_seeds: bool, quick: bool, keep: bool) -> None:
    torch.set_num_threads(threads)
    if not BANKING77.is_dir():
        raise click.ClickException(f"'{BANKING77}' does not exist; set ATTNMEM_DATA to the folder that holds banking77")
    tokenizer = GgufTokenizer(DEFAULT_MODEL)
    if choose_seeds:
        rows = [gain(make_case(tokenizer, BANKING77, seed)) for seed in (CANDIDATES[:1] if quick else CANDIDATES)]
        record.finish("seeds", rows, key=("seed",), quick=quick, keep=keep)
        return
    rows = []
    for seed in SEEDS[:1] if quick else SEEDS:
        case = make_case(tokenizer, BANKING77, seed, 4 if quick else N_TESTS)
        rows += [measure(case, name, fresh) for name in systems or (("no prefix", FULL) if quick else SYSTEMS)]
    record.finish(
        "tasks", rows, table(rows), key=("system", "seed"), quick=quick, keep=keep, threads=threads, peers=presses.versions()
    )


def gain(case: Case) -> dict:
    """Accuracy without the prefix and with it, on the rows of the choice."""
    row = {"seed": case.seed}
    for name, prefix in (("none", []), ("full", case.prefix.tokens)):
        n = torch.get_num_threads()
        classifier = Classifier(case.labels, DEFAULT_MODEL, prefix=prefix, n_threads=n, n_threads_batch=n)
        row[name] = sum(classifier(live) == label for live, label in case.choice) / len(case.choice)
        classifier.close()
    return row | {"gain": row["full"] - row["none"]}


def measure(case: Case, name: str, fresh: bool) -> dict:
    """What a system answered, one digit per test in `correct`; an error if it failed."""
    row = {"seed": case.seed, "system": name}
    path = case.folder / f"{name.replace('/', ':')}.json"
    if path.exists() and not fresh:
        return row | json.loads(path.read_text())
    console.print(f"seed {case.seed}: {name}", highlight=False)
    try:
        result = SYSTEMS[name](case)
    except Exception as error:  # a row of the table, not the end of the run
        console.print(f"  {type(error).__name__}: {error}", style="red", markup=False)
        return row | {"error": f"{type(error).__name__}: {error}"}
    correct = [answer == label for answer, (_, label) in zip(result.pop("answers"), case.tests)]
    result |= {"correct": "".join(str(int(c)) for c in correct), "accuracy": float(np.mean(correct))}
    n = len(case.prefix.tokens)
    result |= {"bytes": round(result["share"] * kv_bytes(n)), "prefix_tokens": n}
    path.write_text(json.dumps(result))
    return row | result


def table(rows: list[dict]) -> Table:
    """A line per system, a column per seed."""
    seeds = sorted({row["seed"] for row in rows})
    result = Table(title="accuracy, in percent")
    for title in ("system", "share", *(f"seed {seed}" for seed in seeds), "mean", "to the full prefix", "ms per test"):
        result.add_column(title, justify="left" if title == "system" else "right", no_wrap=True)
    by_system: dict[str, dict[int, dict]] = {}
    for row in rows:
        if "error" not in row:
            by_system.setdefault(row["system"], {})[row["seed"]] = row
    for name in dict.fromkeys(row["system"] for row in rows):
        runs = by_system.get(name)
        if runs is None:
            result.add_row(name, "", *("failed" for _ in seeds))
            continue
        in_pytorch = name == FULL_PYTORCH or name.split()[0] in presses.PRESSES
        full = by_system.get(FULL_PYTORCH if in_pytorch else FULL, {})
        shared = [seed for seed in runs if seed in full]
        result.add_row(
            name,
            f"{np.mean([run['share'] for run in runs.values()]):.3f}",
            *(f"{100 * runs[seed]['accuracy']:.1f}" if seed in runs else "failed" for seed in seeds),
            _mean(np.concatenate([_correct(run) for run in runs.values()])),
            _mean(np.concatenate([_correct(runs[s]) - _correct(full[s]) for s in shared]), "+") if shared else "",
            f"{np.mean([run['ms_per_test'] for run in runs.values()]):.0f}",
        )
    return result


def _correct(row: dict) -> np.ndarray:
    """float64 [n_tests]: 1 where the answer was right."""
    return np.array([float(c) for c in row["correct"]])


def _mean(x: np.ndarray, sign: str = "") -> str:
    return f"{100 * x.mean():{sign}.1f} ± {100 * x.std(ddof=1) / len(x) ** 0.5:.1f}"
