"""attnmem build"""

from pathlib import Path

import click

from .common import file_type, model_argument


@click.command()
@model_argument
@click.argument("prefix", type=file_type)
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="The memory file.  [default: PREFIX.mem.gguf]")
@click.option(
    "-q",
    "--queries",
    multiple=True,
    default=("repeat", "self-study"),
    show_default=True,
    help="Where queries come from: repeat, self-study, or a file of traces (text, or .jsonl with text or messages). May be given several times.",
)
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), help="Size of the memory as a share of the prefix's F16 KV cache.  [default: 1/8]")
@click.option("--bytes", "nbytes", type=click.IntRange(1), help="Size of the memory in bytes, instead of --share.")
@click.option("--system", is_flag=True, help="The text of PREFIX is the system message of a chat.")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="cpu or cuda.  [default: cuda when there is a GPU]")
def build(model: Path, prefix: Path, out: Path | None, queries: tuple[str, ...], **options) -> None:
    """Build the memory of PREFIX: a text file, or .json with chat messages.

    MODEL may also be a transformers directory.
    """
    from ..build import build_memory
    from ..progress import Progress
    from .show import print_memory

    out = out or prefix.with_name(prefix.name + ".mem.gguf")
    progress = Progress()
    memory = build_memory(model, prefix, out, queries=queries, progress=progress, **options)
    print_memory(memory, out)
    click.echo("built in " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in progress.seconds.items()))
