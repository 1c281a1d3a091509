"""Progress of long work: on a terminal one bar with a time left per stage, in a log a line now and then."""

import time
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

EVERY = 10  # seconds between two lines of a log


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
        """Yields a function that advances the stage, in units of total."""
        start = time.monotonic()
        with (self._bar if self.console.is_terminal else self._lines)(name, total) as step:
            yield step
        self.seconds[name] = time.monotonic() - start

    @contextmanager
    def _bar(self, name: str, total: int | None):
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=self.console) as bars:
            task = bars.add_task(name, total=total)
            yield lambda n=1: bars.advance(task, n)
            bars.update(task, total=total or 1, completed=total or 1)

    @contextmanager
    def _lines(self, name: str, total: int | None):
        start = told = time.monotonic()
        done = 0

        def step(n: int = 1) -> None:
            nonlocal told, done
            done += n
            now = time.monotonic()
            if total and now - told >= EVERY:
                told = now
                left = (now - start) * max(total - done, 0) / done
                self._say(f"{name}: {min(done / total, 1):.0%}, {left:.0f} s left")

        self._say(name)
        yield step

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
