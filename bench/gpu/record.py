"""What a run on a GPU has measured, as a record."""

from pathlib import Path

import click

from ..common import record
from ..common.paths import RESULTS
from .table import folder_argument, results


@click.command()
@folder_argument
def main(folder: Path) -> None:
    """Copy what has been measured, in FOLDER, to bench/results/.  [default: build/gpu]"""
    stages = results(folder)
    if not stages:
        raise click.ClickException(f"{folder} has no results; run the stages of bench/gpu.sh first")
    if any(result["quick"] for result in stages.values()):
        raise click.ClickException("these are results of a --quick trial, which measures nothing; run the stages without --quick")
    runs = [{"command": f"python -m bench gpu {name}", **result} for name, result in stages.items()]
    claim = f"gpu.{runs[0]['hardware'].lower().replace(' ', '-')}"
    click.echo(record.save(RESULTS / f"{claim}.json", claim, runs))
