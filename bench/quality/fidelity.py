"""How well memories and their peers stand in for a prefix, against the bytes that they take.

All methods compress the same prefix, may look at the same build text, and are scored on the same live text after it, which
none has seen (bench/common/cases.py). KL is to the full-prefix run, in nats per position; NLL is of the true text, in nats
per token; in a chat the true text is what the full-prefix model answers. A share is of the bytes of the prefix's F16 KV
cache. All run in llama.cpp on an F32 copy of the default model, with two exceptions: the quantized default is compared with
itself, and presses of kvpress run in PyTorch, where their KL is to the full cache.

An interrupted run resumes: finished cells are kept under build/bench/. --fresh measures the chosen ones again.
"""

import json
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from attnmem_local.builder.build import build_memory
from attnmem_local.builder.progress import Progress
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.memory import Memory

from ..common import record
from ..common.builder import build_model, half_precision_memory, without_tuning
from ..common.cases import CASES, FULL, QUICK, Case, f32_model, novel, readme
from ..common.scoring import kv_bytes, score
from ..peers import presses, runtime
from ..peers.attention_matching import attention_matching

SHARES = tuple(Fraction(1, n) for n in (32, 16, 8))
console = Console(stderr=True)


def attnmem(case: Case, share: float, quantized: bool = False) -> dict:
    """A memory, on the F32 copy or on the quantized model that it was built from."""
    path = memory_path(case, share)
    memory = Memory.load(path)
    result = score(case, DEFAULT_MODEL if quantized else f32_model(), memory=path)
    return result | {"share": memory.nbytes() / memory.kv_bytes(), "build": memory.build}


def half_precision(case: Case, share: float) -> dict:
    """The same anchors with F16 tables, whatever bytes they take."""
    memory = half_precision_memory(case.prefix, case.build_windows, int(share * kv_bytes(len(case.prefix.tokens))))
    path = case.folder / "half-precision.mem.gguf"
    memory.save(path)
    return score(case, f32_model(), memory=path) | {"share": memory.nbytes() / memory.kv_bytes()}


def composed(case: Case, share: float) -> dict:
    """Two memories attached together: that of the case, and one of another document of the same size."""
    other = (readme if case.name == "novel" else novel)(case.size)
    paths = [memory_path(case, share), memory_path(other, share)]
    nbytes = sum(Memory.load(path).nbytes() for path in paths)
    return score(case, f32_model(), memory=paths) | {"share": nbytes / kv_bytes(len(case.prefix.tokens))}


def memory_path(case: Case, share: float) -> Path:
    """The memory of a case, built once."""
    path = case.folder / f"attnmem {share:.5f}.mem.gguf"
    if not path.exists():
        build_memory(build_model(), case.prefix, path, queries=[case.build_windows], share=share, progress=Progress())
    return path


# (case, share of the bytes) -> kl, nll, top1 and the share really taken
METHODS: dict[str, Callable[[Case, float], dict]] = {
    "attnmem": attnmem,
    "attnmem (quantized model)": partial(attnmem, quantized=True),
    "attnmem (F16 tables)": half_precision,
    "attnmem (and another memory)": composed,
    "attention matching": attention_matching,
    **{press: partial(presses.kvpress, press=press) for press in presses.PRESSES},
    "truncated prefix": runtime.truncated,
}
# methods whose share is not a choice: (case) -> the same
FIXED: dict[str, Callable[[Case], dict]] = {
    "full prefix": lambda case: runtime.full_prefix(case) | {"share": 1.0},
    "no prefix": lambda case: runtime.no_prefix(case) | {"share": 0.0},
    **{f"KV cache in {name}": partial(runtime.quantized_kv, name=name) for name in runtime.QUANTIZED},
}
QUICK_METHODS = [name for name in (*FIXED, *METHODS) if name not in presses.PRESSES and "another" not in name]


class ShareType(click.ParamType):
    name = "share"

    def convert(self, value, param, context) -> Fraction:
        try:
            share = Fraction(value)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        return share if 0 < share <= 1 else self.fail(f"'{value}' is not a share such as 1/8", param, context)


SHARE = ShareType()


@click.command(help=__doc__)
@click.option("--prefix", "prefixes", multiple=True, type=click.Choice(list(CASES)), help="[default: all]")
@click.option("--share", "shares", multiple=True, type=SHARE, help="Of the F16 KV cache.  [default: 1/32, 1/16, 1/8]")
@click.option("--method", "methods", multiple=True, type=click.Choice([*FIXED, *METHODS]), help="[default: all]")
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@record.options
def main(prefixes, shares, methods, fresh: bool, quick: bool, keep: bool) -> None:
    if quick:
        without_tuning()
    prefixes = prefixes or (("readme",) if quick else CASES)
    shares = shares or (SHARES[-1:] if quick else SHARES)
    methods = methods or (QUICK_METHODS if quick else (*FIXED, *METHODS))
    rows = []
    for name in prefixes:
        try:
            case = CASES[name](QUICK if quick else FULL)
        except FileNotFoundError as error:
            message = f"{name} is left out: '{error.filename}' does not exist; set ATTNMEM_DATA to the folder of the texts"
            console.print(message, style="yellow")
            continue
        rows += measure(case, shares, methods, fresh)
    if not rows:
        raise click.ClickException("none of the prefixes can be measured; set ATTNMEM_DATA to the folder of the texts")
    key = ("prefix", "method", "target")
    record.finish("fidelity", rows, table(rows), key=key, quick=quick, keep=keep, peers=presses.versions())


def measure(case: Case, shares, methods, fresh: bool) -> list[dict]:
    """A row per method and share; a method that fails has an error in place of figures."""
    rows = []
    for method in methods:
        for share in (None,) if method in FIXED else shares:
            row = {"prefix": case.name, "method": method, "target": share and float(share)}
            stem = method if share is None else f"{method} {float(share):.5f}"
            for old in case.folder.glob(f"{stem}.*") if fresh else ():
                old.unlink()
            path = case.folder / f"{stem}.json"
            if path.exists():
                row |= json.loads(path.read_text())
            else:
                console.print(f"{case.name}: {method} {share or ''}", highlight=False)
                try:
                    row |= FIXED[method](case) if share is None else METHODS[method](case, float(share))
                except Exception as error:  # a row of the table, not the end of the run
                    row |= {"error": f"{type(error).__name__}: {error}"}
                    console.print(f"  {row['error']}", style="red", markup=False)
                else:
                    n = len(case.prefix.tokens)
                    row |= {"bytes": round(row["share"] * kv_bytes(n)), "prefix_tokens": n}
                    path.write_text(json.dumps(row))
            rows.append(row)
    return rows


def table(rows: list[dict]) -> Table:
    """A line per prefix and method, a column per share; the last one has methods whose share is not a choice."""
    targets = sorted({row["target"] for row in rows if row["target"]})
    result = Table(title="KL / NLL by share of the F16 KV cache")
    for title in ("prefix", "method", *(str(Fraction(t).limit_denominator(1000)) for t in targets), "fixed share"):
        result.add_column(title, no_wrap=True)
    for prefix in dict.fromkeys(row["prefix"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            cells = {row["target"]: _cell(row) for row in rows if (row["prefix"], row["method"]) == (prefix, method)}
            if cells:
                result.add_row(prefix, method, *(cells.get(t, "") for t in (*targets, None)))
        result.add_section()
    return result


def _cell(row: dict) -> str:
    if "error" in row:
        return "failed"
    if row["prefix"] == "continuation":
        return " ".join(f"{kl:.4f}" for kl in row["kl_windows"])
    return f"{row['kl']:.4f} / {row['nll']:.3f}" + (f" at {row['share']:.2f}" if row["target"] is None else "")
