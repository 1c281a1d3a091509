"""What a run on a GPU has measured, as a table."""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from ..common.paths import ROOT

STAGES = ("check", "attention", "decode", "builder")


def results(folder: Path) -> dict[str, dict]:
    """By stage."""
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in STAGES if (folder / f"{name}.json").exists()}


folder_argument = click.argument("folder", type=click.Path(exists=True, path_type=Path), default=ROOT / "build/gpu")


@click.command()
@folder_argument
def main(folder: Path) -> None:
    """Show what has been measured, in FOLDER.  [default: build/gpu]"""
    stages = results(folder)
    measured = {name: result["rows"] for name, result in stages.items()}
    bandwidth = next((row["gb_per_s"] for row in measured.get("attention", ()) if row["what"] == "copy"), None)
    if bandwidth:
        click.echo(f"a copy on the device: {bandwidth:.0f} GB/s")
    shown = Table(title=f"memories on {', '.join({result['hardware'] for result in stages.values()})}")
    for title in ("what", "tokens or entries", "batch", "attention, µs per layer", "of bandwidth", "ms per step", "of bandwidth"):
        shown.add_column(title, justify="left" if title == "what" else "right")
    attention, decode = (
        {(row["what"], row["n"], row["batch"]): row for row in measured.get(name, ()) if "n" in row}
        for name in ("attention", "decode")
    )
    for key in dict.fromkeys([*attention, *decode]):
        cells = ["", "", "", ""]
        if row := attention.get(key):
            cells[:2] = f"{row['us_per_layer']:.1f}", f"{row['share_of_bandwidth']:.0%}"
        if row := decode.get(key):
            cells[2] = f"{row['ms_per_step']:.2f}"
            cells[3] = f"{row['bytes'] / row['ms_per_step'] / 1e6 / bandwidth:.0%}" if bandwidth else ""
        shown.add_row(*map(str, key), *cells)
    Console(width=120).print(shown)
    for row in measured.get("builder", ()):
        parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in row["stages"].items())
        peak = row["peak_bytes"] / 1e9
        click.echo(f"builder, {row['prefix_tokens']} tokens: {row['seconds']:.0f} s, {peak:.1f} GB at most ({parts})")
    for row in measured.get("check", ()):
        click.echo(f"{row['what']}: {'ok' if row['ok'] else 'FAILED'}")
