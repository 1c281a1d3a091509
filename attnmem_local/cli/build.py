"""attnmem build"""

from pathlib import Path

import click

from .common import (
    Number,
    build_model_argument,
    device_option,
    file_type,
    out_type,
    positive,
    print_seconds,
    queries_option,
    seed_option,
    tools_option,
)


@click.command()
@build_model_argument
@click.argument("prefix", type=file_type, nargs=-1, required=True)
@click.option("-o", "--out", type=out_type, help="The memory file.  [default: the first PREFIX with .mem.gguf]")
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
@click.option("--table", type=click.Choice(("centroid", "tangent")), help="What is looked up with --anchors 0.  [default: centroid, as in the paper]")
@click.option("--system", is_flag=True, help="The text of PREFIX is the system message of a chat.")
@tools_option
@seed_option
@device_option
def build(model: Path, prefix: tuple[Path, ...], out: Path | None, queries: tuple[str, ...], **options) -> None:
    """Build the memory of PREFIX: text files that together are the prefix, or a .json with chat messages.

    MODEL may also be a transformers directory. Each of several files can be changed later by `attnmem update`.
    """
    from ..builder.build import build_memory
    from ..builder.progress import Progress
    from .show import print_memory

    out = out or prefix[0].with_name(prefix[0].name + ".mem.gguf")
    progress = Progress()
    memory = build_memory(model, list(prefix), out, queries=queries, progress=progress, **options)
    print_memory(memory, out)
    print_seconds(progress)
