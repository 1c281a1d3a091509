"""Task accuracy of memories and their peers: many-shot intent classification on banking77 (classify.py has its rules).

    .venv/bin/python bench/tasks.py [--system "no prefix"] [--tests 200] [--threads 2] [--fresh] [--json]

The answer of a system is the intent whose label, with the line end after it, has the highest log-probability after
`Query: …\\nIntent:`; the same exact search for all (labels.py). All systems may see the prefix and 500 other labelled
training rows, the traces. A share is of the bytes of the prefix's F16 KV cache. All run the quantized default model in
llama.cpp, but for the peers of kvpress: those run its weights as float32 in PyTorch, and have a full prefix of their own.

Prints accuracy per seed, the mean over all tests with its standard error, and the difference to the full prefix with
the standard error of the paired difference. A run of everything is written with date and versions to results/. What has
been measured is kept under build/tasks-cache, so that an interrupted run goes on where it was; --fresh measures the
chosen systems again. Needed: pip install -e ".[build,bench]".
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
from classify import N_TESTS, Case, Classifier, make_case
from fidelity import versions
from peers import presses
from peers.attention_matching import matching_memory
from peers.runtime import QUANTIZED
from prefixes import DATA, builder
from rich.console import Console
from rich.table import Table
from scoring import kv_bytes, record

from attnmem_local.builder.budget import uniform_plan
from attnmem_local.builder.build import build_memory, fit_memory
from attnmem_local.builder.capture import prefill
from attnmem_local.builder.progress import Progress
from attnmem_local.engine.tokenizer import GgufTokenizer
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.prefix import Prefix

FULL, FULL_PYTORCH = "full prefix", "full prefix, PyTorch"
N_MORE = 5120  # tokens of the prefix with traces before it
SEEDS = 1, 2, 8  # of nine, those that intents.py found to gain most from the full prefix, on other rows
console = Console(stderr=True)


def classify(case: Case, share: float, **context) -> dict:
    """Answers in the runtime after a fixed context."""
    classifier = Classifier(case.labels, DEFAULT_MODEL, n_threads=THREADS, n_threads_batch=THREADS, **context)
    start = time.perf_counter()
    answers = [classifier(live) for live, _ in case.tests]
    seconds = time.perf_counter() - start
    classifier.close()
    return {"answers": answers, "share": share, "ms_per_test": 1000 * seconds / len(answers)}


def with_memory(case: Case, name: str, build: Callable[[Path], object]) -> dict:
    """Answers with a memory; build(path) writes it."""
    path = case.folder / f"{name}.mem.gguf"
    start = time.perf_counter()
    build(path)
    seconds = time.perf_counter() - start
    memory = Memory.load(path)
    found = classify(case, memory.nbytes() / kv_bytes(case), memory=path)
    path.unlink()
    return found | {"build_seconds": seconds, "build": memory.build}


def attnmem(case: Case, share: float) -> dict:
    return with_memory(case, f"attnmem-{share}", lambda path: build(case, case.prefix, case.traces, share, path))


def attnmem_more(case: Case, share: float) -> dict:
    """Traces as demonstrations: they lengthen the prefix, not the memory."""
    tokens, rest = demonstrations(case)
    prefix = Prefix(tokens, builder().tokenizer.decode(tokens))
    return with_memory(case, f"attnmem-more-{share}", lambda path: build(case, prefix, rest, share, path))


def build(case: Case, prefix: Prefix, traces: list[list[int]], share: float, path: Path) -> None:
    texts = [builder().tokenizer.decode(trace) for trace in traces]
    build_memory(builder(), prefix, path, queries=[texts], nbytes=int(share * kv_bytes(case)), progress=Progress())


def demonstrations(case: Case) -> tuple[list[int], list[list[int]]]:
    """The prefix after as many traces as make it N_MORE tokens, and the traces that are left."""
    tokens, n = [], 0
    while len(tokens) + len(case.traces[n]) + len(case.prefix.tokens) <= N_MORE:
        tokens += case.traces[n]
        n += 1
    return tokens + case.prefix.tokens, case.traces[n:]


def centroids(case: Case, entries: int) -> dict:
    """Nearest centroid alone, with the same number of entries in every head."""

    def build(path: Path) -> None:
        model = builder()
        plan = uniform_plan(model.spec, entries=entries)
        fit_memory(model, case.prefix, prefill(model, case.prefix.tokens), case.traces, plan, progress=Progress()).save(path)

    return with_memory(case, f"centroids-{entries}", build)


def attention_matching(case: Case, share: float) -> dict:
    """The same number of keys in every head."""
    return with_memory(case, f"matching-{share}", lambda path: matching_memory(case, share).save(path))


def kvpress(case: Case, share: float, press: str) -> dict:
    presses.install()
    job = case.folder / "kvpress-job.json"
    asked = {"labels": case.labels, "tests": [live for live, _ in case.tests]}
    job.write_text(json.dumps({"gguf": str(DEFAULT_MODEL), "prefix": case.prefix.tokens, "chat": False} | asked))
    command = [presses.PYTHON, Path(presses.__file__).with_name("kvpress_run.py"), job]
    environment = os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, input=f"{press} {share}\n", stdout=subprocess.PIPE, text=True, env=environment, check=True)
    found = json.loads(done.stdout)
    if "error" in found:
        raise RuntimeError(found["error"])
    return found


SYSTEMS: dict[str, Callable[[Case], dict]] = {
    "no prefix": lambda case: classify(case, 0.0),
    FULL: lambda case: classify(case, 1.0, prefix=case.prefix.tokens),
    "half of the demonstrations": lambda case: classify(case, len(case.half) / len(case.prefix.tokens), prefix=case.half),
    "attnmem 1/4": partial(attnmem, share=1 / 4),
    "traces before the full prefix": lambda case: classify(case, N_MORE / len(case.prefix.tokens), prefix=demonstrations(case)[0]),
    "attnmem 1/4, traces before the prefix": partial(attnmem_more, share=1 / 4),
    "attnmem, equal bytes, traces before the prefix": partial(attnmem_more, share=1.0),
    "centroids, equal bytes": partial(centroids, entries=1280),  # with their search graphs and lists
    "attention matching 1/4": partial(attention_matching, share=1 / 4),
    **{
        f"KV cache in {name}": lambda case, t=t, s=s: classify(
            case, s, prefix=case.prefix.tokens, type_k=t, type_v=t, flash_attn=True
        )
        for name, (t, s) in QUANTIZED.items()
    },
    FULL_PYTORCH: partial(kvpress, share=1.0, press="Knorm"),  # a press that drops nothing
    **{f"{press} 1/4": partial(kvpress, share=1 / 4, press=press) for press in presses.PRESSES},
}
THREADS = os.cpu_count() or 1


@click.command()
@click.option("--data", type=click.Path(path_type=Path), default=DATA, help="Folder with banking77; default: ATTNMEM_DATA.")
@click.option("--tests", default=N_TESTS, show_default=True, help="Per seed.")
@click.option("--system", "systems", multiple=True, type=click.Choice(list(SYSTEMS)), help="Default: all.")
@click.option("--threads", default=THREADS, show_default=True, help="CPU threads; 1 is best on a machine with other work.")
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@click.option("--json", "as_json", is_flag=True)
def main(data: Path, tests: int, systems, threads: int, fresh: bool, as_json: bool) -> None:
    global THREADS
    THREADS = threads
    torch.set_num_threads(threads)
    rows = []
    for seed in SEEDS:
        case = make_case(GgufTokenizer(DEFAULT_MODEL), data / "banking77", seed, tests)
        rows += [measure(case, name, fresh) for name in systems or SYSTEMS]
    result = {"date": date.today().isoformat(), "versions": versions(), "tests": tests, "threads": threads, "rows": rows}
    if not systems and tests == N_TESTS:
        record("tasks-cpu", result)
    if as_json:
        click.echo(json.dumps(result))
    else:
        Console(width=150).print(table(rows))


def measure(case: Case, name: str, fresh: bool) -> dict:
    """What a system answered, one digit per test in `correct`; an error if it failed."""
    row = {"seed": case.seed, "system": name}
    path = case.folder / f"{name.replace('/', ':')}.json"
    if path.exists() and not fresh:
        return row | json.loads(path.read_text())
    console.print(f"seed {case.seed}: {name}", highlight=False)
    try:
        found = SYSTEMS[name](case)
    except Exception as error:  # one system that fails is a row of the table, not the end of the run
        console.print(f"  {type(error).__name__}: {error}", style="red", markup=False)
        return row | {"error": f"{type(error).__name__}: {error}"}
    correct = [answer == label for answer, (_, label) in zip(found.pop("answers"), case.tests)]
    found |= {"correct": "".join(str(int(c)) for c in correct), "accuracy": float(np.mean(correct))}
    found |= {"bytes": round(found["share"] * kv_bytes(case)), "prefix_tokens": len(case.prefix.tokens)}
    path.write_text(json.dumps(found))
    return row | found


def table(rows: list[dict]) -> Table:
    """A row per system, a column per seed."""
    seeds = sorted({row["seed"] for row in rows})
    found = Table(title="accuracy, in percent")
    for title in ("system", "share", *(f"seed {seed}" for seed in seeds), "mean", "to the full prefix", "ms per test"):
        found.add_column(title, justify="left" if title == "system" else "right", no_wrap=True)
    by_system: dict[str, dict[int, dict]] = {}
    for row in rows:
        if "error" not in row:
            by_system.setdefault(row["system"], {})[row["seed"]] = row
    for name in dict.fromkeys(row["system"] for row in rows):
        runs = by_system.get(name)
        if runs is None:
            found.add_row(name, "", *("failed" for _ in seeds))
            continue
        full = by_system.get(FULL_PYTORCH if name.endswith("PyTorch") or name.split()[0] in presses.PRESSES else FULL, {})
        shared = [seed for seed in runs if seed in full]
        found.add_row(
            name,
            f"{np.mean([run['share'] for run in runs.values()]):.3f}",
            *(f"{100 * runs[seed]['accuracy']:.1f}" if seed in runs else "failed" for seed in seeds),
            _mean(np.concatenate([_correct(run) for run in runs.values()])),
            _mean(np.concatenate([_correct(runs[s]) - _correct(full[s]) for s in shared]), "+") if shared else "",
            f"{np.mean([run['ms_per_test'] for run in runs.values()]):.0f}",
        )
    return found


def _correct(row: dict) -> np.ndarray:
    """float64 [n_tests]: 1 where the answer was right."""
    return np.array([float(c) for c in row["correct"]])


def _mean(x: np.ndarray, sign: str = "") -> str:
    return f"{100 * x.mean():{sign}.1f} ± {100 * x.std(ddof=1) / len(x) ** 0.5:.1f}"


if __name__ == "__main__":
    main()
