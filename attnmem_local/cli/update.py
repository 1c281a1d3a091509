"""attnmem update"""

from pathlib import Path

import click

from ..library import memory_path, model_of
from .common import (
    device_option,
    memory_argument,
    model_option,
    prefix_argument,
    print_seconds,
    queries_option,
    seed_option,
    tools_option,
)


@click.command()
@memory_argument
@prefix_argument
@model_option(None, folder=True)
@click.option("-o", "--out", help="The new memory, by name or by file.  [default: MEMORY]")
@queries_option
@tools_option
@seed_option
@device_option
def update(
    memory: Path, prefix: tuple[Path, ...], model: Path | None, out: str | None, queries: tuple[str, ...], **options
) -> None:
    """Rebuild the changed parts of a memory.

    PREFIX: all parts of the prefix, as `attnmem build` took them; parts may be changed, added and left out.
    """
    path = memory if out is None else memory_path(out)
    model = model or model_of([memory], folder=True)

    from ..builder.progress import Progress
    from ..builder.update import update_memory
    from .show import print_memory

    progress = Progress()
    result = update_memory(memory, model, list(prefix), path, queries=queries, progress=progress, **options)
    print_memory(result, path)
    print_seconds(progress)
