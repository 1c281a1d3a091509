"""Progress of long work: on a terminal a bar per stage with the time left, in a log a line now and then."""

import time
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

EVERY = 10  # seconds between two lines in a log


class Progress:
    """Stages one after another. `seconds` holds the duration of each."""

    def __init__(self, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet)
        self.seconds: dict[str, float] = {}
        self.expected: float | None = None  # seconds of the remaining stages, set by expect()

    def expect(self, n_written: int, seconds: float) -> None:
        """Announce the remaining stages: tokens that self-study will write, and seconds."""
        self.expected = seconds
        text = f"writing {n_written:,} tokens of self-study, " if n_written else ""
        about = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        self.say(f"{text}about {about} on this machine")

    def say(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None):
        """A stage of the work. Yields a function that advances it, in units of total."""
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
                self.say(f"{name}: {min(done / total, 1):.0%}, {left:.0f} s left")

        self.say(name)
        yield step
