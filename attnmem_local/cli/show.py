"""attnmem show"""

import json
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from ..memory import KINDS, Memory
from .common import file_type, json_option

POOR_SHARE = 1 / 4  # of the KL without the prefix: what leaves more is worth a warning


@click.command()
@click.argument("memory", type=file_type)
@json_option
def show(memory: Path, as_json: bool) -> None:
    """Check a memory file and show what it holds."""
    loaded = Memory.load(memory)
    if as_json:
        click.echo(json.dumps(summary(loaded)))
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
        "build": memory.build,
        "fidelity": memory.fidelity,
    }


def print_memory(memory: Memory, path: Path) -> None:
    table = Table(title=str(path), show_header=False, title_justify="left")
    text = memory.prefix_text.replace("\n", " ")
    rows = {
        "model": f"{memory.model.architecture}, {memory.model.block_count} layers, {memory.model.head_count_kv} KV heads",
        "prefix": f"{len(memory.prefix_tokens)} tokens of {'chat' if memory.prefix_messages is not None else 'text'}: {text[:60]}…",
        "size": f"{memory.nbytes() / 1e6:.1f} MB, KV cache of the prefix: {memory.kv_bytes() / 1e6:.1f} MB",
    }
    for kind in KINDS:
        if (n := memory.n_entries(kind.name)).any():
            rows[f"{kind.name}s"] = f"{n.min()} to {n.max()} per KV head, {n.sum()} in all"
    rows |= {name: str(value) for name, value in memory.build.items()}
    if f := memory.fidelity:
        rows["fidelity"] = (
            f"KL to the full prefix {f['kl_mean']:.4f} (without the prefix {f['kl_none']:.3f}), same most likely token {f['top1']:.1%}; "
            f"nats per token {f['nll_memory']:.3f}, full prefix {f['nll_full']:.3f}, without {f['nll_none']:.3f}; "
            f"on {f['tokens']:.0f} tokens of live text that it was not built from"
        )
    for row in rows.items():
        table.add_row(*row)
    console = Console()
    console.print(table)
    if warning := _warning(memory.fidelity):
        console.print(f"[yellow]warning:[/yellow] {warning}")


def _warning(fidelity: dict[str, float]) -> str | None:
    if not fidelity:
        return "the memory was not measured when it was built: there was too little live text to hold some out"
    if fidelity["kl_mean"] > POOR_SHARE * fidelity["kl_none"]:
        return (
            f"the memory stands for its prefix poorly: {fidelity['kl_mean'] / fidelity['kl_none']:.0%} of what leaving out the prefix "
            "does to the answers is left. Give it more bytes (--share), or traces of what you will ask (--queries)"
        )
    return None
