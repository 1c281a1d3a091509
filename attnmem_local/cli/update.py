"""attnmem update"""

from pathlib import Path

import click

from .common import (
    build_model_argument,
    device_option,
    file_type,
    memory_type,
    out_type,
    print_seconds,
    queries_option,
    seed_option,
    tools_option,
)


@click.command()
@click.argument("memory", type=memory_type)
@build_model_argument
@click.argument("prefix", type=file_type, nargs=-1, required=True)
@click.option("-o", "--out", type=out_type, help="The new memory file.  [default: MEMORY]")
@queries_option
@tools_option
@seed_option
@device_option
def update(memory: Path, model: Path, prefix: tuple[Path, ...], out: Path | None, queries: tuple[str, ...], **options) -> None:
    """Rebuild those parts of MEMORY whose text has changed.

    PREFIX: all parts of the prefix, as `attnmem build` took them; parts may be changed, added and left out.
    """
    from ..builder.progress import Progress
    from ..builder.update import update_memory
    from .show import print_memory

    progress = Progress()
    result = update_memory(memory, model, list(prefix), out or memory, queries=queries, progress=progress, **options)
    print_memory(result, out or memory)
    print_seconds(progress)
