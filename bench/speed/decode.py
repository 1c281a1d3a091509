"""What a token costs with a memory, without a prefix, and with the prefix in the context: decoding, prefill, start, RSS.

For the default model, and for random weights in Q4_0 with the shape of Llama-3.2-1B. Memories have the size that the default
build gives them and are filled with random numbers (bench/common/shapes.py). Modes are interleaved token by token, in random
order, because the full prefix leaves less in the caches for the next one; a ratio is the median over tokens of (time in this
mode / time without a prefix). All modes use flash attention. The full prefix is put into the KV cache without a prefill
(filled_cache.py).

Cold start: a fresh process, from its start to the first token after 16 live ones; peak RSS is that of this process. With the
full prefix that includes its prefill, so it is left out where a prefill takes more than a minute or two.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click

from attnmem_local.evaluate.scorer import Scorer
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.memory import Memory

from ..common import record
from ..common.paths import BUILD, ROOT
from ..common.shapes import LLAMA_1B, default_memory, write_llama
from .cold_start import options
from .filled_cache import fill

MODELS = {"default": (DEFAULT_MODEL, (512, 2048, 4096, 7600)), "1b": (BUILD / "llama-1b.gguf", (2048, 8192, 32768))}
COLD = {("default", "full"): 7600, ("default", "full-q8"): 2048, ("1b", "full"): 2048, ("1b", "full-q8"): 0}  # longest prefix
MODES = ("none", "full", "full-q8", "memory")
LIVE, N_PREFILL, N_DECODE = 64, 512, 24


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), help="[default: both]")
@click.option("--rounds", default=3, show_default=True, help="Of 24 tokens in each mode.")
@click.option("--threads", default=os.cpu_count(), show_default=True)
@record.options
def main(models: tuple[str, ...], rounds: int, threads: int, quick: bool, keep: bool) -> None:
    rows = []
    for name in models or (("default",) if quick else MODELS):
        path, lengths = MODELS[name]
        if name == "1b" and not path.exists():
            write_llama(path, LLAMA_1B)
        for n in (256,) if quick else lengths:
            rows += measure(name, path, n, 1 if quick else rounds, threads)
    claim, key = f"decode.{record.instructions()}", ("model", "prefix_tokens", "mode")
    record.finish(claim, rows, key=key, quick=quick, keep=keep, threads=threads)


def measure(name: str, model: Path, n_prefix: int, rounds: int, threads: int) -> list[dict]:
    """A row per mode for a prefix of n_prefix tokens."""
    path = BUILD / f"decode-{name}-{n_prefix}.mem.gguf"
    if not path.exists():
        default_memory(model, n_prefix).save(path)
    tokens = Memory.load(path).prefix_tokens
    scorers = {}
    for mode in MODES:
        context = options(mode, str(path)) | {"n_threads": threads, "n_threads_batch": threads}
        scorers[mode] = Scorer(model, n_live=N_PREFILL + (n_prefix if mode.startswith("full") else 0), **context)
        if mode.startswith("full"):
            fill(scorers[mode], n_prefix)
    decode: dict[str, list[float]] = {mode: [] for mode in MODES}
    prefill: dict[str, list[float]] = {mode: [] for mode in MODES}
    order = random.Random(0)
    for round_ in range(rounds):
        steps = {mode: scorer.decode(tokens[:LIVE], N_DECODE + 1) for mode, scorer in scorers.items()}
        for i in range(N_DECODE + 1):
            for mode in order.sample(MODES, len(MODES)):
                _, seconds = next(steps[mode])
                if i > 0:  # the first includes the live text
                    decode[mode].append(1000 * seconds)
        for mode in order.sample(MODES, len(MODES)):
            if round_ == 0 or not mode.startswith("full"):  # those take minutes
                prefill[mode].append(prefill_seconds(scorers[mode], (tokens * 2)[:N_PREFILL]))
    for scorer in scorers.values():
        scorer.close()
    rows = []
    for mode in MODES:
        row = {"model": name, "prefix_tokens": n_prefix, "mode": mode, "ms_per_token": statistics.median(decode[mode])}
        row |= {"ms_spread": spread(decode[mode]), "ratio_to_none": ratio(decode[mode], decode["none"])}
        row["prefill_tokens_per_s"] = N_PREFILL / statistics.median(prefill[mode])
        row["prefill_ratio"] = ratio(prefill[mode], prefill["none"])
        if n_prefix <= COLD.get((name, mode), n_prefix):
            n_runs = 1 if mode.startswith("full") else 4 * rounds
            cold = [cold_start(model, mode, path, tokens, threads, i) for i in range(n_runs)]
            row |= {key: statistics.median(run[key] for run in cold) for key in cold[0]}
        row["file_bytes"] = path.stat().st_size if mode == "memory" else 0
        rows.append(row)
    return rows


def prefill_seconds(scorer: Scorer, tokens: list[int]) -> float:
    """Of live tokens in one batch, where only the last has logits."""
    llama = scorer.llama
    llama._ctx.kv_cache_seq_rm(-1, scorer.n_prefix, -1)
    llama._batch.set_batch(batch=tokens, n_past=scorer.n_prefix, logits_all=False)
    start = time.perf_counter()
    llama._ctx.decode(llama._batch)
    return time.perf_counter() - start


def cold_start(model: Path, mode: str, memory: Path, tokens: list[int], threads: int, run: int) -> dict:
    """Each run has an environment of another size, because where a heap begins moves the peak of RSS by tenths of a MB."""
    job = {"model": str(model), "mode": mode, "memory": str(memory), "threads": threads, "tokens": tokens}
    job["started"] = time.time()
    command = [sys.executable, "-m", "bench.speed.cold_start"]
    env = os.environ | {"BENCH_PAD": "x" * (700 * run)}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=True, env=env, cwd=ROOT)
    return json.loads(done.stdout)


def ratio(a: list[float], b: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(a, b))


def spread(x: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, _, high = statistics.quantiles(x, n=4)
    return (high - low) / 2
