"""attnmem show"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import json_option, memory_argument
from .terminal import one_line

if TYPE_CHECKING:
    from ..memory.memory import Memory

SHOWN = 60  # characters of the prefix


@click.command()
@memory_argument
@json_option
def show(memory: Path, as_json: bool) -> None:
    """Check a memory and show what it holds.

    It holds what was measured when it was built, too: how good a stand-in for its prefix it is.
    """
    from ..memory.memory import Memory
    from ..memory.report import summary

    loaded = Memory.load(memory)
    if as_json:
        click.echo(json.dumps(summary(loaded), allow_nan=False))
    else:
        print_memory(loaded, memory)


def print_memory(memory: "Memory", path: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..memory.entries import KINDS
    from ..memory.report import warning

    table = Table(title=Text(one_line(str(path))), show_header=False, title_justify="left")
    text = memory.prefix_text
    shown = text[:SHOWN] + "…" if len(text) > SHOWN else text
    build = dict(memory.build)
    model = f"{memory.model.architecture}, {memory.model.block_count} layers, {memory.model.head_count_kv} KV heads"
    rows = [
        ("model", f"{build.pop('model')}: {model}" if "model" in build else model),
        ("prefix", f"{len(memory.prefix_tokens)} tokens of {'chat' if memory.prefix_messages is not None else 'text'}: {shown}"),
        ("size", f"{memory.nbytes() / 1e6:.1f} MB, KV cache of the prefix: {memory.kv_bytes() / 1e6:.1f} MB"),
    ]
    for kind in KINDS:
        if (n := memory.n_entries(kind.name)).any():
            rows.append((f"{kind.name}s", f"{n.min()} to {n.max()} per KV head, {n.sum()} in all"))
    rows += [(name, str(value)) for name, value in build.items()]
    if memory.fidelity:
        rows.append(("fidelity", _fidelity(memory.fidelity)))
    for name, value in rows:
        table.add_row(Text(one_line(name)), Text(one_line(value)))
    console = Console()
    console.print(table)
    if reason := warning(memory.fidelity):
        console.print(Text("warning: ", style="yellow").append(reason, style="default"))


def _fidelity(f: dict[str, float]) -> str:
    return (
        f"KL to the full prefix {f['kl_mean']:.4f} (without the prefix {f['kl_none']:.3f}), "
        f"same most likely token {f['top1']:.1%}; "
        f"nats per token {f['nll_memory']:.3f}, full prefix {f['nll_full']:.3f}, without {f['nll_none']:.3f}; "
        f"on {f['tokens']:.0f} tokens of live text that it was not built from"
    )
