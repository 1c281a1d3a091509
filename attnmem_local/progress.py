"""Progress of long work on the terminal: one bar with a time left per stage, and how long each took."""

import time
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress as Bars, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Progress:
    """Stages one after another; `seconds` holds how long each took."""

    def __init__(self, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        self.seconds: dict[str, float] = {}
        self.expected: float | None = None  # seconds of the stages to come, once expect() has been told them

    def expect(self, n_written: int, seconds: float) -> None:
        """What the stages to come will take: tokens that self-study writes, and seconds."""
        self.expected = seconds
        text = f"writing {n_written:,} tokens of self-study, " if n_written else ""
        about = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        self.console.print(f"{text}about {about} on this machine", markup=False, highlight=False)

    @contextmanager
    def stage(self, name: str, total: int | None = None):
        """Yields a function that advances the bar."""
        columns = (TextColumn("{task.description:<12}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        start = time.monotonic()
        with Bars(*columns, console=self.console) as bars:
            task = bars.add_task(name, total=total)
            yield lambda n=1: bars.advance(task, n)
            bars.update(task, total=total or 1, completed=total or 1)
        self.seconds[name] = time.monotonic() - start
