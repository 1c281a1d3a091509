"""attnmem build"""

from pathlib import Path

import click

from .common import file_type, model_argument, print_seconds, queries_option, tools_option


@click.command()
@model_argument
@click.argument("prefix", type=file_type, nargs=-1, required=True)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="The memory file.  [default: the first PREFIX with .mem.gguf]")
@queries_option
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), help="Size of the memory as a share of the prefix's F16 KV cache.  [default: 1/8, less for a prefix so long that tokens would be slower]")
@click.option("--bytes", "nbytes", type=click.IntRange(1), help="Size of the memory in bytes, instead of --share.")
@click.option("--system", is_flag=True, help="The text of PREFIX is the system message of a chat.")
@tools_option
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="cpu or cuda.  [default: cuda when there is a GPU]")
def build(model: Path, prefix: tuple[Path, ...], out: Path | None, queries: tuple[str, ...], **options) -> None:
    """Build the memory of PREFIX: text files that together are the prefix, or a .json with chat messages.

    MODEL may also be a transformers directory. Each of several files can be changed later by `attnmem update`.
    """
    from ..build import build_memory
    from ..progress import Progress
    from .show import print_memory

    out = out or prefix[0].with_name(prefix[0].name + ".mem.gguf")
    progress = Progress()
    memory = build_memory(model, list(prefix), out, queries=queries, progress=progress, **options)
    print_memory(memory, out)
    print_seconds(progress)
