"""What a token costs with a memory: decoding, prefill, start and memory use, against no prefix and against the prefix.

    .venv/bin/python bench/decode.py [--model default] [--prefix-tokens 2048] [--rounds 3] [--threads 2] [--json]

For the default model, and for random weights with the shape of Llama-3.2-1B in Q4_0. The memories are as large as the
default build makes them, filled with random numbers (shapes.py). Modes take turns token by token, in an order that changes,
because the full prefix leaves less in the caches to the next one; a ratio is the median over these turns. All run with flash
attention. The full prefix is in the KV cache without a prefill (filled_cache.py).
Cold start: a process of its own, from its start to the first token after 16 live ones; peak RSS is that process's. With the
full prefix that includes its prefill, so it is run as far as that takes no more than a minute or two.
A run over all lengths is written to results/ as it goes, with its date and the instructions that the runtime was compiled for,
and with a plot of ms per token at the end.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import click
import matplotlib
from cold_start import options
from filled_cache import fill
from prefixes import BUILD
from rich.console import Console
from rich.table import Table
from scoring import instructions, record
from shapes import LLAMA_1B, default_memory, write_llama

from attnmem_local.evaluate.scorer import Scorer
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.memory import Memory

MODELS = {"default": (DEFAULT_MODEL, (512, 2048, 4096, 7600)), "1b": (BUILD / "llama-1b.gguf", (2048, 8192, 32768))}
COLD = {
    ("default", "full"): 7600,
    ("default", "full-q8"): 2048,
    ("1b", "full"): 2048,
    ("1b", "full-q8"): 0,
}  # prefills take minutes
MODES = ("none", "full", "full-q8", "memory-scan", "memory-hnsw")
LIVE, N_PREFILL, N_DECODE = 64, 512, 24
console = Console(stderr=True, width=170)


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=tuple(MODELS), help="Default: both.")
@click.option("--prefix-tokens", "lengths", multiple=True, type=int, help="Default: 512 to 7,600, and to 32,768 for 1b.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on the last line.")
def main(models: tuple[str, ...], lengths: tuple[int, ...], rounds: int, threads: int, as_json: bool) -> None:
    rows = []
    for name in models:
        path, all_lengths = MODELS[name]
        if name == "1b" and not path.exists():
            write_llama(path, LLAMA_1B)
        for n in lengths or all_lengths:
            rows += measure(name, path, n, rounds, threads)
            result = {"date": date.today().isoformat(), "threads": threads, "rows": rows}
            console.print(table([row for row in rows if (row["model"], row["prefix_tokens"]) == (name, n)]))
            if not lengths:
                recorded = record(f"decode-{instructions()}-{'-'.join(models)}", result)
    if not lengths:
        plot(rows, recorded.with_suffix(".png"))
    if as_json:
        click.echo(json.dumps(result))


def measure(name: str, model: Path, n_prefix: int, rounds: int, threads: int) -> list[dict]:
    path = BUILD / f"bench-decode-{name}-{n_prefix}.mem.gguf"
    if not path.exists():
        default_memory(model, n_prefix).save(path)
    tokens = Memory.load(path).prefix_tokens
    live = tokens[:LIVE]
    scorers = {}
    for mode in MODES:
        asked = options(mode, str(path)) | {"n_threads": threads, "n_threads_batch": threads}
        scorers[mode] = Scorer(model, n_live=N_PREFILL + (n_prefix if mode.startswith("full") else 0), **asked)
        if mode.startswith("full"):
            fill(scorers[mode], n_prefix)
    decode: dict[str, list[float]] = {mode: [] for mode in MODES}
    prefill: dict[str, list[float]] = {mode: [] for mode in MODES}
    order = random.Random(0)
    for round_ in range(rounds):
        steps = {mode: scorer.decode(live, N_DECODE + 1) for mode, scorer in scorers.items()}
        for i in range(N_DECODE + 1):
            for mode in order.sample(MODES, len(MODES)):
                _, seconds = next(steps[mode])
                if i > 0:  # the first includes the live text
                    decode[mode].append(1000 * seconds)
        for mode in order.sample(MODES, len(MODES)):
            if round_ == 0 or not mode.startswith("full"):  # which take minutes
                prefill[mode].append(prefill_seconds(scorers[mode], (tokens * 2)[:N_PREFILL]))
    for scorer in scorers.values():
        scorer.close()
    rows = []
    for mode in MODES:
        row = {"model": name, "mode": mode, "prefix_tokens": n_prefix, "ms_per_token": statistics.median(decode[mode])}
        row |= {"ms_spread": spread(decode[mode]), "ratio_to_none": ratio(decode[mode], decode["none"])}
        row |= {
            "prefill_tokens_per_s": N_PREFILL / statistics.median(prefill[mode]),
            "prefill_ratio": ratio(prefill[mode], prefill["none"]),
        }
        if n_prefix <= COLD.get((name, mode), n_prefix):
            cold = [cold_start(model, mode, path, tokens, threads, i) for i in range(1 if mode.startswith("full") else 4 * rounds)]
            row |= {key: statistics.median(run[key] for run in cold) for key in cold[0]}
        row["file_bytes"] = path.stat().st_size if mode.startswith("memory") else 0
        rows.append(row)
    return rows


def prefill_seconds(scorer: Scorer, tokens: list[int]) -> float:
    """For live tokens in one batch, of which only the last has logits."""
    llama = scorer.llama
    llama._ctx.kv_cache_seq_rm(-1, scorer.n_prefix, -1)
    llama._batch.set_batch(batch=tokens, n_past=scorer.n_prefix, logits_all=False)
    start = time.perf_counter()
    llama._ctx.decode(llama._batch)
    return time.perf_counter() - start


def cold_start(model: Path, mode: str, memory: Path, tokens: list[int], threads: int, run: int) -> dict:
    """Each run has an environment of another size, because where a heap begins moves the peak of RSS by tenths of a MB."""
    job = {"model": str(model), "mode": mode, "memory": str(memory), "threads": threads, "tokens": tokens}
    script = Path(__file__).with_name("cold_start.py")
    job["started"] = time.time()
    env = os.environ | {"BENCH_PAD": "x" * (700 * run)}
    done = subprocess.run([sys.executable, script], input=json.dumps(job), capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout)


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b))


def spread(x: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, _, high = statistics.quantiles(x, n=4)
    return (high - low) / 2


def table(rows: list[dict]) -> Table:
    found = Table(title="memories against no prefix and the full prefix")
    for title in (
        "model",
        "prefix",
        "mode",
        "ms per token",
        "to none",
        "prefill tok/s",
        "time to none",
        "first token, s",
        "load, ms",
        "attach, ms",
        "peak RSS, MB",
        "file, MB",
    ):
        found.add_column(title, justify="left" if title in ("model", "mode") else "right")
    for row in rows:
        cold = [""] * 4
        if "first_token_s" in row:
            cold = [
                f"{row['first_token_s']:.2f}",
                f"{row['load_ms']:.1f}",
                f"{row['attach_ms']:.1f}",
                f"{row['peak_rss_bytes'] / 1e6:.1f}",
            ]
        found.add_row(
            row["model"],
            str(row["prefix_tokens"]),
            row["mode"],
            f"{row['ms_per_token']:.2f} ± {row['ms_spread']:.2f}",
            f"{row['ratio_to_none']:.2f}",
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['prefill_ratio']:.2f}",
            *cold,
            f"{row['file_bytes'] / 1e6:.1f}",
        )
    return found


def plot(rows: list[dict], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names):
        for mode in MODES:
            own = [row for row in rows if row["model"] == name and row["mode"] == mode]
            axis.plot([row["prefix_tokens"] for row in own], [row["ms_per_token"] for row in own], marker="o", label=mode)
        axis.set(title=name, xlabel="prefix tokens", ylabel="ms per token", xscale="log", ylim=0)
    axes[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
