"""What all commands share: the default model, options that read the same everywhere, errors without tracebacks."""

import functools
import logging
import math
import sys
from pathlib import Path

import click

from ..builder.sources import DEFAULT_SOURCES, SOURCES
from ..library import DEFAULT_MODEL
from ..memory.errors import AttnmemError, BadInput
from ..memory.filekind import file_kind
from ..memory.messages import parse_tools
from ..prompt.texts import read_text
from .terminal import printable

CTX_STEP = 256  # llama.cpp rounds the size of a context up to a multiple of it
MAX_CTX = 2**24
MAX_THREADS = 512  # of ggml


class Group(click.Group):
    """Shows the errors that bad input causes as one line, and leaves those of the program as they are."""

    def invoke(self, context: click.Context):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 lacks most characters
        logging.getLogger("attnmem_local").addHandler(_WARNINGS)
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise  # whoever reads the output has enough of it: click ends the program quietly
        except click.ClickException as error:
            error.message = printable(error.message)  # names of files are text from elsewhere, too
            raise
        except (OSError, AttnmemError) as error:
            text = str(error)
            if isinstance(error, OSError) and error.strerror:  # without the number
                text = f"'{error.filename}': {error.strerror}" if error.filename else error.strerror
            raise click.ClickException(printable(text)) from error


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


_WARNINGS = _Warnings()


def say(text: str) -> None:
    """A remark that is not the result of the command."""
    click.echo(printable(text), err=True)


class _Tools(click.ParamType):
    name = "file"

    def convert(self, value, param, context) -> list[dict]:
        try:
            return parse_tools(read_text(value))
        except (OSError, BadInput) as error:
            self.fail(f"'{value}': {error}", param, context)


class _File(click.Path):
    """A model or a memory; the other one in its place is told before anything is loaded."""

    def __init__(self, wanted: str, folder: bool = False):
        super().__init__(exists=True, readable=True, dir_okay=folder, path_type=Path)
        self.wanted = self.name = wanted

    def convert(self, value, param, context) -> Path:
        if self.wanted == "model" and value == "default":
            value = DEFAULT_MODEL
            if not value.exists():
                self.fail(f"there is no model at '{value}'; run ./build.sh to fetch it", param, context)
        elif self.wanted == "model" and not Path(value).exists():
            self.fail(f"there is no model at '{value}'", param, context)
        path = super().convert(value, param, context)
        if path.is_dir():
            return path
        if not path.is_file():
            self.fail(f"'{path}' is not a regular file", param, context)
        found = file_kind(path)
        if found == "other":
            self.fail(f"'{path}' is not a GGUF file; a {self.wanted} is needed here", param, context)
        if found not in (self.wanted, "unknown"):
            self.fail(f"'{path}' is {'an' if found == 'adapter' else 'a'} {found}; a {self.wanted} is needed here", param, context)
        return path


class Number(click.FloatRange):
    """A finite number, as a decimal or as a fraction such as 1/16."""

    name = "number"

    def convert(self, value, param, context) -> float:
        try:
            number, slash, divisor = str(value).partition("/")
            number = float(number) / float(divisor if slash else 1)
        except (ValueError, ZeroDivisionError):
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"'{value}' is neither a number nor a fraction", param, context)
        return super().convert(number, param, context)


def _whole_steps(context, param, value: int) -> int:
    size = -value // CTX_STEP * -CTX_STEP
    if size != value:
        say(f"note: the context has {size} tokens, as llama.cpp makes it of a multiple of {CTX_STEP}")
    return size


model_argument = click.argument("model", type=_File("model"))
build_model_argument = click.argument("model", type=_File("model", folder=True))
memory_type = _File("memory")
file_type = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
out_type = click.Path(dir_okay=False, path_type=Path)
positive = click.IntRange(1)
memory_option = click.option(
    "-m",
    "--memory",
    "memories",
    multiple=True,
    required=True,
    type=memory_type,
    help="A memory to attach; may be given several times.",
)
threads_option = click.option(
    "-t", "--threads", type=click.IntRange(1, MAX_THREADS), help="CPU threads.  [default: half of the cores]"
)
ctx_option = click.option(
    "-c",
    "--ctx",
    type=click.IntRange(1, MAX_CTX),
    default=4096,
    show_default=True,
    callback=_whole_steps,
    help=f"Live tokens that fit into the context, rounded up to a multiple of {CTX_STEP}.",
)
seed_option = click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
device_option = click.option("--device", help="cpu or cuda.  [default: cuda when there is a GPU]")
tools_option = click.option(
    "--tools",
    type=_Tools(),
    help="A .json with the tools of the chat, as OpenAI clients send them; they become part of the prefix.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
queries_option = click.option(
    "-q",
    "--queries",
    multiple=True,
    default=DEFAULT_SOURCES,
    show_default=True,
    help=f"Where queries come from: {', '.join(SOURCES)}, or a file of traces (text, or .jsonl with text or messages). "
    "May be given several times.",
)


KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}  # ggml_type


def cache_options(command):
    """Adds --kv-type and --flash-attn; the command gets them as the options type_k, type_v and flash_attn of MemoryLlama."""

    @click.option("--kv-type", type=click.Choice(list(KV_TYPES)), help="Type of the KV cache of the live tokens.  [default: f16]")
    @click.option(
        "--flash-attn",
        type=click.Choice(("on", "off")),
        help="Flash attention.  [default: on with a quantized cache, which needs it]",
    )
    @functools.wraps(command)
    def wrapped(*args, kv_type: str | None, flash_attn: str | None, **options):
        if kv_type is not None:
            options["type_k"] = options["type_v"] = KV_TYPES[kv_type]
        is_quantized = kv_type is not None and kv_type.startswith("q")
        if is_quantized and flash_attn == "off":
            raise click.UsageError(f"a {kv_type} cache needs flash attention; leave out '--flash-attn off', or choose f16")
        if is_quantized or flash_attn is not None:
            options["flash_attn"] = flash_attn != "off"
        return command(*args, **options)

    return wrapped


def temp_option(default: float):
    text = "Sampling temperature; 0 takes the most likely token."
    return click.option("--temp", type=Number(0), default=default, show_default=True, help=text)


def print_seconds(progress) -> None:
    """How long each stage took, and the most memory that the tensors took on GPUs."""
    import torch

    click.echo(
        ", ".join(f"{name} {seconds:.1f} s" for name, seconds in progress.seconds.items())
        + f": {sum(progress.seconds.values()):.0f} s"
    )
    if torch.cuda.is_available():
        peak = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
        click.echo(f"peak GPU memory {peak / 1e9:.1f} GB")
