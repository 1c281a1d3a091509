"""attnmem demo"""

import statistics
import time

import click

from ..library import checkout, find_model
from .terminal import printable

HANDBOOK = "build/tree/vendor/llama.cpp/tools/server/README.md"  # in the checkout


@click.command()
def demo() -> None:
    """Build memories and show what they save.

    The prefix is a real handbook: the README of llama.cpp's server.
    """
    root, model = checkout("the demo", HANDBOOK), find_model("default")

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..builder.progress import Progress
    from ..demo import ANCHORS, ENTRIES, FULL, NONE, QUESTIONS, run_demo

    console = Console()
    start = time.monotonic()
    handbook = (root / HANDBOOK).read_text(encoding="utf-8")

    def tell(memories) -> None:
        seconds = time.monotonic() - start
        console.print(
            f"built build/demo.mem.gguf from the README of llama.cpp's server, and the paper's memory, in {seconds:.0f} s\n"
        )

    result = run_demo(model, handbook, root / "build", Progress(), tell)
    runs, memory = result.runs, result.memories[ANCHORS]
    console.print(f"[bold]{QUESTIONS[0]}[/bold]")
    for name, run in runs.items():
        console.print(Text(f"{name}: ", style="dim").append(printable(run.answer), style="default"))

    table = Table("", *runs)
    nbytes = {FULL: memory.kv_bytes(), NONE: 0} | {name: m.nbytes() for name, m in result.memories.items()}
    table.add_row("prefix tokens in context", *(str(len(memory.prefix_tokens)) if name == FULL else "0" for name in runs))
    table.add_row("bytes for the prefix", *(f"{nbytes[name] / 1e6:.1f} MB" if nbytes[name] else "0" for name in runs))
    table.add_row("time to first token", *(f"{run.first_token:.2f} s" for run in runs.values()))
    table.add_row("ms per token", *(f"{run.ms_per_token:.1f}" for run in runs.values()))
    table.add_row("KL to the full prefix", *(f"{statistics.fmean(run.kl):.3f}" for run in runs.values()))
    console.print()
    console.print(table)
    search = result.search
    console.print(
        f"centroids (the paper): each head finds the nearest of its {ENTRIES} entries by a walk through an HNSW graph, "
        f"which scores {search.n_scored:.0f} of them; in {search.recall:.1%} of {search.n_queries:,} lookups "
        "it is the entry that a scan finds (recall@1)",
        highlight=False,
    )
