"""attnmem eval"""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from ..memory.errors import BadInput
from .common import cache_options, file_type, json_option, memory_type, model_argument, positive, threads_option


@click.group("eval")
def evaluate() -> None:
    """Measure a memory against the full prefix, in the llama.cpp runtime."""


@evaluate.command()
@model_argument
@click.argument("prefix", type=file_type)
@click.option(
    "-n",
    "--tokens",
    type=positive,
    default=1000,
    show_default=True,
    help="Length of the prefix; the text after it is the live text.",
)
@click.option("--live", type=positive, default=384, show_default=True, help="Length of the live text.")
@cache_options
@json_option
def exact(model: Path, prefix: Path, tokens: int, live: int, as_json: bool, **options) -> None:
    """Build the exact memory of PREFIX and compare it with the prefix itself, which is run with an F16 cache.

    Exactness shows on a GGUF in F32. On a quantized model, or with a quantized cache, compare kl_mean with kl_floor: the error
    of the prefix itself when it is run with the same options.
    """
    from ..builder.progress import Progress
    from ..engine.tokenizer import GgufTokenizer
    from ..evaluate.exactness import exactness
    from ..prompt.texts import read_text

    text = GgufTokenizer(model).encode(read_text(prefix), add_bos=True)
    if len(text) < tokens + live:
        raise BadInput(f"'{prefix}' has {len(text)} tokens, {tokens} + {live} are needed; lower --tokens or --live")
    result = exactness(model, text[:tokens], text[tokens : tokens + live], progress=Progress(quiet=as_json), **options)
    _print(result, as_json)


@evaluate.command()
@model_argument
@click.argument("memory", type=memory_type)
@click.argument("text", type=file_type)
@click.option("--window", type=positive, default=384, show_default=True, help="Tokens of TEXT that follow the prefix at a time.")
@click.option("--windows", type=positive, default=4, show_default=True, help="How many windows of TEXT are scored at most.")
@threads_option
@cache_options
@json_option
def fidelity(
    model: Path, memory: Path, text: Path, window: int, windows: int, threads: int | None, as_json: bool, **options
) -> None:
    """Score held-out TEXT with the full prefix, with MEMORY and with neither. TEXT is text or .jsonl, as for build."""
    from ..builder.sources.traces import read_traces, traces
    from ..engine.tokenizer import GgufTokenizer
    from ..evaluate.fidelity import fidelity as measure
    from ..memory.memory import Memory

    loaded = Memory.load(memory)
    scored = traces(GgufTokenizer(model), loaded.prefix, read_traces(text), window)[:windows]
    scored = [w for w in scored if len(w) > 1]
    if not scored:
        raise BadInput(f"'{text}' has no text to score")
    _print(measure(model, memory, scored, n_threads=threads, **options), as_json)


def _print(result: dict, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
        return
    table = Table(show_header=False)
    for name, value in result.items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    Console().print(table)
