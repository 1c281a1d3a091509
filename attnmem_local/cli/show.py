"""attnmem show"""

import json
import math
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..memory.entries import KINDS
from ..memory.memory import Memory
from .common import json_option, memory_type
from .terminal import one_line

POOR_SHARE = 1 / 4  # of the KL without the prefix: what leaves more is worth a warning
SHOWN = 60  # characters of the prefix


@click.command()
@click.argument("memory", type=memory_type)
@json_option
def show(memory: Path, as_json: bool) -> None:
    """Check a memory file and show what it holds."""
    loaded = Memory.load(memory)
    if as_json:
        click.echo(json.dumps(summary(loaded), allow_nan=False))
    else:
        print_memory(loaded, memory)


def summary(memory: Memory) -> dict:
    return {
        "model": asdict(memory.model),
        "prefix_tokens": len(memory.prefix_tokens),
        "prefix_text": memory.prefix_text,
        "prefix_is_chat": memory.prefix_messages is not None,
        "segments": len(memory.layers),
        "entries": {kind.name: int(memory.n_entries(kind.name).sum()) for kind in KINDS},
        "bytes": memory.nbytes(),
        "kv_bytes": memory.kv_bytes(),
        "build": _json_values(memory.build),
        "fidelity": _json_values(memory.fidelity),
    }


def _json_values(values: dict) -> dict:
    """Numbers that are not finite, which JSON has not, as null."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}


def print_memory(memory: Memory, path: Path) -> None:
    table = Table(title=Text(one_line(str(path))), show_header=False, title_justify="left")
    text = memory.prefix_text
    shown = text[:SHOWN] + "…" if len(text) > SHOWN else text
    rows = {
        "model": f"{memory.model.architecture}, {memory.model.block_count} layers, {memory.model.head_count_kv} KV heads",
        "prefix": f"{len(memory.prefix_tokens)} tokens of {'chat' if memory.prefix_messages is not None else 'text'}: {shown}",
        "size": f"{memory.nbytes() / 1e6:.1f} MB, KV cache of the prefix: {memory.kv_bytes() / 1e6:.1f} MB",
    }
    for kind in KINDS:
        if (n := memory.n_entries(kind.name)).any():
            rows[f"{kind.name}s"] = f"{n.min()} to {n.max()} per KV head, {n.sum()} in all"
    lines = [*rows.items(), *memory.build.items()]  # as pairs: a file may call a value of the build "model"
    if memory.fidelity:
        lines.append(("fidelity", _fidelity(memory.fidelity)))
    for name, value in lines:
        table.add_row(Text(one_line(name)), Text(one_line(str(value))))
    console = Console()
    console.print(table)
    if warning := _warning(memory.fidelity):
        console.print(Text("warning: ", style="yellow").append(warning, style="default"))


def _fidelity(f: dict) -> str:
    return (
        f"KL to the full prefix {f['kl_mean']:.4f} (without the prefix {f['kl_none']:.3f}), same most likely token {f['top1']:.1%}; "
        f"nats per token {f['nll_memory']:.3f}, full prefix {f['nll_full']:.3f}, without {f['nll_none']:.3f}; "
        f"on {f['tokens']:.0f} tokens of live text that it was not built from"
    )


def _warning(fidelity: dict) -> str | None:
    if not fidelity:
        return "the memory was not measured when it was built: there was too little live text to hold some out"
    left, none = fidelity["kl_mean"], fidelity["kl_none"]
    if left > POOR_SHARE * none:
        lost = f"{left / none:.0%} of" if none > 0 else "more than"
        return (
            f"the memory stands for its prefix poorly: {lost} what leaving out the prefix does to the answers is left. "
            "Give it more bytes (--share), or traces of what you will ask (--queries)"
        )
    return None
