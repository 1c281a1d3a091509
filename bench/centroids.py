"""Centroids only, on the set-up of docs/quality.md: fidelity, HNSW against scan, and decode speed.

    .venv/bin/python bench/centroids.py [--entries 2048] [--metric l2] [--state mean] [--json]

Prefix: the first 2,048 tokens of the README of llama.cpp's server. Twenty later segments of 384 tokens are the build
text, segments 3 and 9 are held out and scored. Fidelity is measured on an F32 copy of the default model, where the
runtime's own noise is 1e-6, and on the quantized default, where it is 0.003. Decode is measured on the default,
alternating between no prefix, full prefix and memory in one run; the figures are medians.
"""

import json
import os
import statistics
from pathlib import Path

import click

from attnmem_local.builder.budget import uniform_plan
from attnmem_local.builder.build import fit_memory
from attnmem_local.builder.capture import prefill
from attnmem_local.builder.model import load_model
from attnmem_local.builder.progress import Progress
from attnmem_local.evaluate import fidelity
from attnmem_local.evaluate.dequantize import write_f32
from attnmem_local.evaluate.scorer import Scorer
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.prefix import Prefix

BUILD = Path(__file__).parents[1] / "build"
README = BUILD / "tree/vendor/llama.cpp/tools/server/README.md"
N_PREFIX, N_SEGMENT, N_SEGMENTS, HELD_OUT = 2048, 384, 22, (3, 9)


@click.command()
@click.option("--entries", default=2048, show_default=True)
@click.option("--metric", default="l2", show_default=True)
@click.option("--state", default="mean", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(entries: int, metric: str, state: str, as_json: bool) -> None:
    progress = Progress(quiet=as_json)
    f32 = BUILD / "default-f32.gguf"
    if not f32.exists():
        write_f32(DEFAULT_MODEL, f32)

    with progress.stage("load model"):
        model = load_model(DEFAULT_MODEL)
    tokens = model.tokenizer.encode(README.read_text(encoding="utf-8"), add_bos=True)
    prefix = Prefix(tokens[:N_PREFIX], model.tokenizer.decode(tokens[:N_PREFIX]))
    segments = [tokens[N_PREFIX + i * N_SEGMENT :][:N_SEGMENT] for i in range(N_SEGMENTS)]
    held_out = [segments[i] for i in HELD_OUT]
    build_text = [s for i, s in enumerate(segments) if i not in HELD_OUT]

    with progress.stage("prefill", N_PREFIX) as step:
        kv = prefill(model, prefix.tokens, progress=step)
    plan = uniform_plan(model.spec, entries=entries, metric=metric, state=state)
    memory = fit_memory(model, prefix, kv, build_text, plan, progress=progress)
    path = BUILD / "bench-centroids.mem.gguf"
    memory.save(path)

    result: dict = {"entries": entries, "metric": metric, "state": state, "threads": os.cpu_count()}
    result |= {"bytes": memory.nbytes(), "kv_bytes": memory.kv_bytes(), "build_seconds": progress.seconds}
    with progress.stage("score"):
        for name, gguf in (("f32", f32), ("default", DEFAULT_MODEL)):
            for lookup in ("scan", "hnsw"):
                result[f"{name}_{lookup}"] = fidelity(gguf, path, held_out, lookup=lookup)
    with progress.stage("decode"):
        result["decode_ms"] = decode(path, prefix.tokens, held_out[0])
    none = result["decode_ms"]["none"]
    result["decode_ratio_to_none"] = {name: ms / none for name, ms in result["decode_ms"].items()}
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name}: {value if not isinstance(value, dict) else ', '.join(f'{k} {v:.4g}' for k, v in value.items())}")


def decode(memory: Path, prefix: list[int], live: list[int], rounds: int = 5, n: int = 24) -> dict[str, float]:
    """Median ms per token of each run, taken in turns."""
    runs = {
        "none": {},
        "full": {"prefix": prefix},
        "full_flash": {"prefix": prefix, "flash_attn": True},
        "memory_stock": {"memory": memory, "lookup": "stock"},
        "memory_scan": {"memory": memory, "lookup": "scan"},
        "memory_hnsw": {"memory": memory, "lookup": "hnsw"},
    }
    scorers = {name: Scorer(DEFAULT_MODEL, n_threads=os.cpu_count(), **options) for name, options in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in scorers}
    for _ in range(rounds):
        for name, scorer in scorers.items():
            seconds[name] += [s for _, s in list(scorer.decode(live[:32], n))[1:]]
    return {name: 1000 * statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
