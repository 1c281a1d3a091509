"""attnmem update"""

from pathlib import Path

import click

from .common import file_type, model_argument, print_seconds, queries_option, tools_option


@click.command()
@click.argument("memory", type=file_type)
@model_argument
@click.argument("prefix", type=file_type, nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="The new memory file.  [default: MEMORY]")
@queries_option
@tools_option
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="cpu or cuda.  [default: cuda when there is a GPU]")
def update(memory: Path, model: Path, prefix: tuple[Path, ...], out: Path | None, queries: tuple[str, ...], **options) -> None:
    """Rebuild those parts of MEMORY whose text has changed.

    PREFIX: all parts of the prefix, as `attnmem build` took them; parts may be changed, added and left out.
    """
    from ..progress import Progress
    from ..update import update_memory
    from .show import print_memory

    progress = Progress()
    result = update_memory(memory, model, list(prefix), out or memory, queries=queries, progress=progress, **options)
    print_memory(result, out or memory)
    print_seconds(progress)
