"""attnmem eval"""

import json
from pathlib import Path

import click

from ..library import model_of
from ..memory.errors import BadInput
from .common import cache_option, json_option, memory_argument, model_option, positive, text_type, threads_option


@click.group("eval")
def evaluate() -> None:
    """Measure a memory against its prefix.

    Both are run by llama.cpp.
    """


@evaluate.command()
@click.argument("prefix", type=text_type)
@model_option("default")
@click.option(
    "-n",
    "--tokens",
    type=positive,
    default=1000,
    show_default=True,
    help="Length of the prefix; the text after it is the live text.",
)
@click.option("--live", type=positive, default=384, show_default=True, help="Length of the live text.")
@cache_option
@json_option
def exact(prefix: Path, model: Path, tokens: int, live: int, as_json: bool, **options) -> None:
    """Compare an exact memory with its prefix.

    The exact memory of PREFIX has all of its keys and values. The prefix itself is run with an F16 cache.

    Exactness shows on a GGUF in F32. On a quantized model, or with a quantized cache, compare kl_mean with kl_floor: the
    error of the prefix itself when it is run with the same options.
    """
    from ..builder.progress import Progress
    from ..engine.tokenizer import GgufTokenizer
    from ..evaluate.exactness import exactness
    from ..prompt.texts import read_text

    text = GgufTokenizer(model).encode(read_text(prefix), add_bos=True)
    if len(text) < tokens + live:
        raise BadInput(
            f"'{prefix}' has {len(text)} tokens, but --tokens {tokens} and --live {live} need {tokens + live}; lower one of them"
        )
    result = exactness(model, text[:tokens], text[tokens : tokens + live], progress=Progress(quiet=as_json), **options)
    _print(result, as_json)


@evaluate.command()
@memory_argument
@click.argument("text", type=text_type)
@model_option(None)
@click.option("--window", type=positive, default=384, show_default=True, help="Tokens of TEXT that follow the prefix at a time.")
@click.option("--windows", type=positive, default=4, show_default=True, help="Maximum number of windows of TEXT to score.")
@threads_option
@cache_option
@json_option
def fidelity(
    memory: Path, text: Path, model: Path | None, window: int, windows: int, threads: int | None, as_json: bool, **options
) -> None:
    """Score held-out text with and without a memory.

    TEXT, or .jsonl as `attnmem build -q` takes it, is scored with the full prefix, with MEMORY, and with neither.
    """
    model = model or model_of([memory])

    from ..builder.sources.traces import read_traces, traces
    from ..engine.tokenizer import GgufTokenizer
    from ..evaluate.fidelity import fidelity as measure
    from ..memory.memory import Memory

    prefix = Memory.load(memory).prefix
    scored = [w for w in traces(GgufTokenizer(model), prefix, [*read_traces(text)], window)[:windows] if len(w) > 1]
    if not scored:
        raise BadInput(f"'{text}' has no text to score")
    _print(measure(model, memory, scored, n_threads=threads, **options), as_json)


def _print(result: dict, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in result.items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    Console().print(table)
