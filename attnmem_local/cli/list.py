"""attnmem list"""

import json
from collections.abc import Sequence
from dataclasses import asdict

import click

from ..library import Header, memories, memories_folder, memory_name, models, models_folders
from .common import json_option, say
from .terminal import one_line


@click.command("list")
@json_option
def list_(as_json: bool) -> None:
    """Show the names of memories and models."""
    entries = list(memories())
    headers = [entry for entry in entries if isinstance(entry, Header)]
    if as_json:
        rows = [{"name": memory_name(header.path)} | asdict(header) for header in headers]
        click.echo(json.dumps({"memories": rows, "models": list(models())}, default=str))
    else:
        _print_table(
            ("memory", "prefix tokens", "size", "model"),
            [(memory_name(h.path), h.n_prefix_tokens, _megabytes(h.nbytes), h.model or "") for h in headers],
            f"no memories yet in {memories_folder()}: `attnmem build` writes them there",
        )
        click.echo()
        _print_table(
            ("model", "size", "folder"),
            [(path.name, _megabytes(path.stat().st_size), path.parent) for path in models()],
            f"no models in {' or '.join(map(str, models_folders()))}",
        )
    for entry in entries:
        if not isinstance(entry, Header):
            say(f"warning: {entry}")


def _print_table(columns: Sequence[str], rows: Sequence[tuple], empty: str) -> None:
    """Rows under the names of their columns, as wide as they are: what is piped is not cut."""
    if not rows:
        click.echo(one_line(empty))
        return
    cells = [columns, *([one_line(str(value)) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB"
