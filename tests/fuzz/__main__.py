"""The command `python -m fuzz`, which needs tests/ in PYTHONPATH; see docs/fuzzing.md."""

import sys
import tempfile
import time
from pathlib import Path

import click
from helpers.models import Tiny

from .bases import base_memories
from .run import SEED, fuzz


@click.command()
@click.option("--files", default=1000, show_default=True, help="Number of files to try.")
@click.option("--first", default=0, show_default=True, help="Number of the first file.")
@click.option("--seed", default=SEED, show_default=True, help="Seed of the mutations.")
@click.option("--jobs", default=1, show_default=True, help="Number of worker processes.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder to save failing files in.")
@click.option("--stop", is_flag=True, help="Stop at the first failure.")
def main(files: int, first: int, seed: int, jobs: int, keep: Path | None, stop: bool) -> None:
    """Put mutated memory files through both readers, and accepted files through the runtime."""
    last_line = time.monotonic()

    def progress(report):
        nonlocal last_line
        if time.monotonic() - last_line > 60:
            last_line = time.monotonic()
            click.echo(
                f"{report.files} files, {len(report.failures)} failures, {report.files / report.seconds:.0f} files/s", err=True
            )

    with tempfile.TemporaryDirectory() as folder:
        (small := Path(folder, "small")).mkdir()
        (wide := Path(folder, "wide")).mkdir()
        bases = base_memories(Tiny(small), Tiny(wide, head_dim=32))
        report = fuzz(bases, Path(folder), files, seed, first, jobs, keep, stop, progress)
    for (stage, outcome), n in sorted(report.outcomes.items()):
        click.echo(f"{stage:8} {outcome:16} {n:8}")
    for number, mutations, failure in report.failures:
        click.echo(f"file {number}: {failure!r}\n    after {mutations!r:.300}")
    click.echo(
        f"{report.files} files of seed {seed}, {report.files / report.seconds:.0f} per second: {len(report.failures)} failures"
    )
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
