"""attnmem build"""

import shlex
from pathlib import Path

import click

from ..library import MEMORY_SUFFIX, link_model, memories_folder, memory_name, memory_path, model_of
from ..memory.errors import BadInput
from .common import (
    Number,
    device_option,
    model_option,
    positive,
    prefix_argument,
    print_seconds,
    queries_option,
    seed_option,
    tools_option,
)


@click.command()
@prefix_argument
@model_option("default", folder=True)
@click.option("-o", "--out", help="The memory, by name or by file.  [default: the name of the first PREFIX, without its suffix]")
@queries_option
@click.option(
    "--share",
    type=Number(0, 1, min_open=True),
    help="Size of the anchors as a share of the prefix's F16 KV cache, such as 1/16 or 0.1.  "
    "[default: 1/8, less for a prefix so long that tokens would be slower]",
)
@click.option("--bytes", "nbytes", type=positive, help="Size of the anchors in bytes, instead of --share.")
@click.option("--anchors", type=click.IntRange(0), help="Anchors per KV head, instead of a size.")
@click.option(
    "--entries",
    type=click.IntRange(0),
    help="Looked-up entries per KV head, in addition to the size. They correct the anchors; with --anchors 0 they are all of "
    "the memory, as in the paper.  [default: none; with traces, where held-out traces show that they pay]",
)
@click.option(
    "--table",
    type=click.Choice(("centroid", "tangent")),
    help="What is looked up with --anchors 0.  [default: centroid, as in the paper]",
)
@click.option("--system", is_flag=True, help="The text of PREFIX is the system message of a chat.")
@tools_option
@seed_option
@device_option
def build(prefix: tuple[Path, ...], model: Path, out: str | None, queries: tuple[str, ...], **options) -> None:
    """Build the memory of a prefix.

    PREFIX: text files that together are the prefix, or a .json with chat messages. Each of several files can be changed
    later by `attnmem update`.

    The memory is kept under the name of the first file, unless that is taken, or under the name that -o gives. -o also
    takes a file, such as ./handbook.mem.gguf, and replaces what is there.
    """
    path = memory_path(out) if out is not None else _new_path(prefix[0])
    is_named = path.parent == memories_folder()
    if is_named:
        path.parent.mkdir(parents=True, exist_ok=True)

    from ..builder.build import build_memory
    from ..builder.progress import Progress
    from .show import print_memory

    progress = Progress()
    memory = build_memory(model, list(prefix), path, queries=queries, progress=progress, **options)
    print_memory(memory, path)
    print_seconds(progress)
    if is_named and model.is_file():
        link_model(model)
    command = "run" if memory.prefix_messages is None else "chat"
    click.echo(
        f"use it: attnmem {command} {shlex.quote(memory_name(path))}{_model_option(path, model)}{' PROMPT' * (command == 'run')}"
    )


def _new_path(prefix: Path) -> Path:
    """Where the memory of a prefix goes if -o does not tell. Raises BadInput if a memory is there, perhaps of another prefix."""
    if not prefix.is_file():
        raise BadInput(f"'{prefix}' is not a regular file, whose name the memory could have; name the memory by -o")
    path = memories_folder() / f"{prefix.stem}{MEMORY_SUFFIX}"
    if path.exists():
        name = shlex.quote(prefix.stem)
        raise BadInput(f"there is a memory '{prefix.stem}' already; `-o {name}` replaces it, -o with another name keeps both")
    return path


def _model_option(memory: Path, model: Path) -> str:
    """The -m that a command with the memory needs: none if the memory itself leads to its model."""
    try:
        if model_of([memory]).samefile(model):
            return ""
    except BadInput:
        pass
    return f" -m {shlex.quote(str(model))}"
