"""What all commands share: options that read the same everywhere, and errors without tracebacks."""

import functools
import logging
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..builder.sources import DEFAULT_SOURCES, SOURCES
from ..engine.kv_cache import KV_TYPES, cache_options
from ..library import find_memory, find_model, model_of
from ..memory.errors import AttnmemError, BadInput
from ..memory.messages import parse_tools
from ..prompt.texts import read_text
from .terminal import printable

CTX_STEP = 256  # llama.cpp rounds the size of a context up to a multiple of it
MAX_CTX = 2**24
MAX_THREADS = 512  # of ggml


class Group(click.Group):
    """Shows a refusal as one line, and leaves the errors of the program as they are."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(self.commands)  # in the order of use, not of the alphabet

    def invoke(self, context: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal that is not UTF-8 lacks most characters
        logging.getLogger("attnmem_local").addHandler(_WARNINGS)
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise  # the reader of the output has read enough: click ends the program quietly
        except click.ClickException as error:
            error.message = printable(error.message)  # type: ignore[misc]  # names of files are text from elsewhere, too
            raise
        except (OSError, AttnmemError) as error:
            raise click.ClickException(printable(explain(error))) from error


def explain(error: Exception) -> str:
    """An error as users read it: an OSError without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"'{error.filename}': {error.strerror}" if error.filename else error.strerror
    return str(error)


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


_WARNINGS = _Warnings()


def say(text: str) -> None:
    """Print a remark on standard error."""
    click.echo(printable(text), err=True)


# Types of parameters


class _Named(click.ParamType):
    """A model or a memory, by name or by file."""

    def __init__(self, expected: str, find: Callable[[str], Path]):
        self.name = self.expected = expected
        self.find = find

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Path:
        if isinstance(value, Path):
            return value
        try:
            return self.find(value)
        except (OSError, BadInput) as error:
            is_default_model = self.expected == "memory" and value == "default"
            kind = "model" if is_default_model else getattr(error, "kind", None)
            self.fail(_corrected(value, kind, context) or explain(error), param, context)


class _TextFile(click.Path):
    """A file of text, which is read later."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, readable=True, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Path:
        from ..memory.filekind import file_kind

        if Path(value).is_file():  # a pipe can be read only once
            kind = file_kind(value)
        else:
            kind = "model" if value == "default" else "other"
        if kind in ("model", "memory"):
            self.fail(_corrected(value, kind, context) or f"'{value}' is a {kind}; text is needed here", param, context)
        return super().convert(value, param, context)  # type: ignore[return-value]


def _corrected(value: str, kind: str | None, context: click.Context | None) -> str | None:
    """The message for a model or a memory in the wrong place, with the command as it should be; None if it has no place there."""
    if context is None or "model" not in (param.name for param in context.command.params):
        return None
    usage = " ".join(context.command.collect_usage_pieces(context)[1:]).replace("[MEMORY]", "MEMORY")
    if kind == "model":
        return f"'{value}' is a model, which is given by -m: {context.command_path} {usage} -m {shlex.quote(value)}"
    if kind == "memory" and "MEMORY" in usage:
        usage = usage.replace("MEMORY", shlex.quote(value))
        return f"'{value}' is a memory, which comes first: {context.command_path} {usage}"
    return None


class _Tools(click.ParamType):
    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> list[dict]:
        try:
            return parse_tools(read_text(value))
        except (OSError, BadInput) as error:
            text = explain(error)
            self.fail(text if f"'{value}'" in text else f"'{value}': {text}", param, context)


class Number(click.FloatRange):
    """A finite number, as a decimal or as a fraction such as 1/16."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> float:
        try:
            number, slash, divisor = str(value).partition("/")
            quotient = float(number) / float(divisor if slash else 1)
        except (ValueError, ZeroDivisionError):
            quotient = math.nan
        if not math.isfinite(quotient):
            self.fail(f"'{value}' is neither a number nor a fraction", param, context)
        return super().convert(quotient, param, context)


def _rounded_up(context: click.Context, param: click.Parameter, value: int) -> int:
    size = -value // CTX_STEP * -CTX_STEP
    if size != value:
        say(f"note: the context has {size} tokens, as llama.cpp rounds it up to a multiple of {CTX_STEP}")
    return size


positive = click.IntRange(1)
memory_type = _Named("memory", find_memory)
text_type = _TextFile()

# Arguments and options

memory_argument = click.argument("memory", type=memory_type)
prefix_argument = click.argument("prefix", type=text_type, nargs=-1, required=True)


def model_option(default: str | None, folder: bool = False):
    """-m. default: a name, or None for the model that the memory names. folder: a transformers directory will do, too."""
    return click.option(
        "-m",
        "--model",
        type=_Named("model", functools.partial(find_model, folder=folder)),
        default=default,
        show_default=True if default else "the model that the memory was built for",
        help=f"The model, by name or by file: a GGUF{' or a transformers directory' if folder else ''}.",
    )


memories_option = click.option(
    "-M",
    "--memory",
    "more",
    multiple=True,
    type=memory_type,
    help="A memory, beside MEMORY or instead of it; may be given several times.",
)
threads_option = click.option(
    "-t",
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="CPU threads.  [default: half of the cores, all of them for a prompt]",
)
ctx_option = click.option(
    "-c",
    "--ctx",
    type=click.IntRange(1, MAX_CTX),
    default=4096,
    show_default=True,
    callback=_rounded_up,
    help=f"Live tokens that fit into the context, rounded up to a multiple of {CTX_STEP}.",
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of all that is drawn at random."
)
device_option = click.option("--device", help="cpu or cuda.  [default: cuda when there is a GPU]")
tools_option = click.option(
    "--tools",
    type=_Tools(),
    help="A .json with the tools of the chat, as OpenAI clients send them; they become part of the prefix.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
queries_option = click.option(
    "-q",
    "--queries",
    multiple=True,
    default=DEFAULT_SOURCES,
    show_default=True,
    help=f"Text to build from: {', '.join(SOURCES)}, or a file of traces: text, or .jsonl with text or messages. "
    "May be given several times.",
)


def temp_option(default: float):
    text = "Sampling temperature; 0 takes the most likely token."
    return click.option("--temp", type=Number(0), default=default, show_default=True, help=text)


def cache_option(command):
    """Adds --kv-type and --flash-attn; the command gets options of MemoryLlama instead."""

    @click.option("--kv-type", type=click.Choice(list(KV_TYPES)), help="Type of the KV cache of the live tokens.  [default: f16]")
    @click.option(
        "--flash-attn",
        type=click.Choice(("on", "off")),
        help="Flash attention.  [default: on with a quantized cache, which needs it]",
    )
    @functools.wraps(command)
    def wrapped(*args, kv_type: str | None, flash_attn: str | None, **options):
        return command(*args, **options, **cache_options(kv_type, None if flash_attn is None else flash_attn == "on"))

    return wrapped


def memories_and_model(first: Path | None, more: tuple[Path, ...], model: Path | None) -> tuple[tuple[Path, ...], Path]:
    """The memories of a command, the one that comes first in front, and their model. Raises UsageError if there is no memory."""
    memories = (*([first] if first else []), *more)
    if not memories:
        raise click.UsageError("no memory is given: name one first, or by -M; `attnmem list` shows what is there")
    return memories, model or model_of(memories)


def print_seconds(progress) -> None:
    """How long each stage took, and the most memory that tensors took on GPUs."""
    import torch

    click.echo(
        ", ".join(f"{name} {seconds:.1f} s" for name, seconds in progress.seconds.items())
        + f": {sum(progress.seconds.values()):.0f} s"
    )
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        click.echo(f"peak GPU memory {peak / 1e9:.1f} GB")
