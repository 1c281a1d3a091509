"""How well memories and their peers stand in for a prefix, against the bytes that they take.

    .venv/bin/python bench/fidelity.py [--prefix readme] [--method KVzip] [--share 1/8] [--fresh] [--json] [--quick]

Prefixes: see prefixes.py. Every method compresses the same prefix, may look at the same build text, and is scored on
the same live text after it, which no method has seen. KL is to the full-prefix run, in nats per position; NLL is of the
true text, in nats per token; in the chat the true text is what the full-prefix model answers. A share is of the bytes of
the prefix's F16 KV cache. Models: an F32 copy of the default one; the row of the quantized model compares that with
itself. Peers of kvpress run in PyTorch, and their KL is to the full cache there; all others run in llama.cpp.

Prints a table; a run of everything writes it with date and versions, and a plot, to results/. What has been measured is
kept under build/fidelity-cache, so that an interrupted run goes on where it was; --fresh measures the chosen rows again.
Needed: pip install -e ".[build,bench]".
"""

import json
from collections.abc import Callable
from datetime import date
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click
from peers import presses, runtime
from peers.attention_matching import attention_matching
from prefixes import CASES, FULL, QUICK, Case, builder, f32_model
from rich.console import Console
from rich.table import Table
from scoring import kv_bytes, record, score

from attnmem_local.builder.build import build_memory
from attnmem_local.builder.progress import Progress
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.memory import Memory

SHARES = tuple(Fraction(1, n) for n in (32, 16, 8))
console = Console(stderr=True)


def attnmem(case: Case, share: float, quantized: bool = False) -> dict:
    """Our memory, on the F32 copy or on the quantized model that it was built from."""
    path = case.folder / f"attnmem {share:.5f}.mem.gguf"
    if not path.exists():
        windows = case.build_windows()
        build_memory(builder(), case.prefix, path, queries=[windows], share=share, progress=Progress())
    memory = Memory.load(path)
    measured = score(case, DEFAULT_MODEL if quantized else f32_model(), memory=path)
    return measured | {"share": memory.nbytes() / memory.kv_bytes(), "build": memory.build}


# of a given share of the bytes: (case, share) -> kl, nll, top1 and the share really taken
METHODS: dict[str, Callable[[Case, float], dict]] = {
    "attnmem": attnmem,
    "attnmem (quantized model)": partial(attnmem, quantized=True),
    "attention matching": attention_matching,
    **{press: partial(presses.kvpress, press=press) for press in presses.PRESSES},
    "truncated prefix": runtime.truncated,
}
# that take what they take: (case) -> the same
FIXED: dict[str, Callable[[Case], dict]] = {
    "full prefix": lambda case: runtime.full_prefix(case) | {"share": 1.0},
    "no prefix": lambda case: runtime.no_prefix(case) | {"share": 0.0},
    **{f"KV cache in {name}": partial(runtime.quantized_kv, name=name) for name in runtime.QUANTIZED},
}


class _Share(click.ParamType):
    name = "share"

    def convert(self, value, param, context) -> Fraction:
        try:
            share = Fraction(value)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        return share if 0 < share <= 1 else self.fail(f"'{value}' is not a share such as 1/8", param, context)


@click.command()
@click.option("--prefix", "prefixes", multiple=True, type=click.Choice(list(CASES)), help="Default: all.")
@click.option("--share", "shares", multiple=True, type=_Share(), help="Of the F16 KV cache; default: 1/32, 1/16, 1/8.")
@click.option("--method", "methods", multiple=True, type=click.Choice([*FIXED, *METHODS]), help="Default: all.")
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@click.option("--quick", is_flag=True, help="A trial on 512 tokens and one window.")
@click.option("--json", "as_json", is_flag=True)
def main(prefixes, shares, methods, fresh: bool, quick: bool, as_json: bool) -> None:
    rows = []
    for name in prefixes or CASES:
        try:
            case = CASES[name](QUICK if quick else FULL)
        except FileNotFoundError as error:
            console.print(
                f"{name} is left out: '{error.filename}' is missing; ATTNMEM_DATA names the folder of the data", style="yellow"
            )
            continue
        rows += measure(case, shares or SHARES, methods or (*FIXED, *METHODS), fresh)
    result = {"date": date.today().isoformat(), "versions": versions(), "quick": quick, "rows": rows}
    if not rows:
        raise click.ClickException("there is nothing to measure")
    if not (prefixes or shares or methods or quick):
        plot(rows, record("fidelity-cpu", result).with_suffix(".png"))
    if as_json:
        click.echo(json.dumps(result))
    else:
        Console(width=180).print(table(rows))


def measure(case: Case, shares, methods, fresh: bool) -> list[dict]:
    """One row per method and share, those that failed with an error instead of figures."""
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
                except Exception as error:  # one method that fails is a row of the table, not the end of the run
                    row |= {"error": f"{type(error).__name__}: {error}"}
                    console.print(f"  {row['error']}", style="red", markup=False)
                else:
                    row |= {"bytes": round(row["share"] * kv_bytes(case)), "prefix_tokens": len(case.prefix.tokens)}
                    path.write_text(json.dumps(row))
            rows.append(row)
    return rows


def versions() -> dict[str, str]:
    names = ("attnmem-local", "llama-cpp-python", "torch", "transformers")
    return {name: version(name) for name in names} | presses.versions()


def table(rows: list[dict]) -> Table:
    """A row per prefix and method, a column per share; methods with a share of their own have it in the last one."""
    targets = sorted({row["target"] for row in rows if row["target"]})
    found = Table(title="KL / NLL by share of the F16 KV cache")
    for title in ("prefix", "method", *(str(Fraction(t).limit_denominator(1000)) for t in targets), "share of its own"):
        found.add_column(title, no_wrap=True)
    for prefix in dict.fromkeys(row["prefix"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            cells = {row["target"]: _cell(row) for row in rows if (row["prefix"], row["method"]) == (prefix, method)}
            if cells:
                found.add_row(prefix, method, *(cells.get(t, "") for t in (*targets, None)))
        found.add_section()
    return found


def _cell(row: dict) -> str:
    if "error" in row:
        return "failed"
    return f"{row['kl']:.4f} / {row['nll']:.3f}" + (f" at {row['share']:.2f}" if row["target"] is None else "")


def plot(rows: list[dict], path: Path) -> None:
    """KL above and NLL below against the share, one column per prefix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(row["prefix"] for row in rows))
    methods = [m for m in dict.fromkeys(row["method"] for row in rows) if m not in ("full prefix", "no prefix")]
    figure, panels = pyplot.subplots(2, len(names), figsize=(1.5 + 4.5 * len(names), 9), sharex=True, squeeze=False)
    colours = pyplot.get_cmap("tab20").colors
    for column, name in enumerate(names):
        here = [row for row in rows if row["prefix"] == name]
        for i, quantity in enumerate(("kl", "nll")):
            axes = panels[i][column]
            for j, method in enumerate(methods):
                points = sorted((row["share"], row[quantity]) for row in here if row["method"] == method)
                if not points:
                    continue
                width, above = (2.5, 3) if method.startswith("attnmem") else (1.2, 2)
                style = dict(marker="os^Dv"[j % 5], markersize=5, color=colours[j % 20], linewidth=width, zorder=above)
                axes.plot(*zip(*points), label=method, **style)
            for bound, style in (("full prefix", "-"), ("no prefix", ":")):
                for row in here:
                    if row["method"] == bound and not (quantity == "kl" and bound == "full prefix"):
                        axes.axhline(row[quantity], color="black", linestyle=style, linewidth=1, label=bound)
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
        panels[0][column].set_yscale("log")
        panels[0][column].set_title(f"{name}, {here[0]['prefix_tokens']:,} tokens")
        panels[1][column].set_xlabel("bytes / bytes of the F16 KV cache")
    panels[0][0].set_ylabel("KL to the full prefix (nats)")
    panels[1][0].set_ylabel("NLL of the true text (nats per token)")
    labels = {label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
