"""Trying many mutated files, in worker processes that may crash or hang."""

import faulthandler
import multiprocessing
import multiprocessing.connection
import pickle
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .bases import Base
from .container import parse
from .mutate import mutated

SEED = 22
CPU_SECONDS = 15  # CPU time for a file, beyond which it counts as a hang; check.MAX_SECONDS limits each reader
WALL_SECONDS = 120  # wall time for a file, to catch hangs that use no CPU
_SPAWN = multiprocessing.get_context("spawn")


@dataclass
class Report:
    files: int = 0
    seconds: float = 0.0
    outcomes: Counter = field(default_factory=Counter)  # number of files by (stage, outcome)
    failures: list[tuple[int, list[str], str]] = field(default_factory=list)  # file number, base and mutations, failure


def fuzz(
    bases: list[Base],
    folder: Path,
    files: int,
    seed: int = SEED,
    first: int = 0,
    jobs: int = 1,
    keep: Path | None = None,
    stop: bool = False,
    progress: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Try files `first` to `first + files - 1` of a seed. A file depends on the seed and its number alone.

    keep: a folder to save failing files in. stop: stop at the first failure.
    """
    report, start = Report(), time.monotonic()
    (folder / "bases").write_bytes(pickle.dumps(bases))
    todo = [list(range(first + job, first + files, jobs)) for job in range(jobs)]
    workers = [_Worker(folder / str(job), folder / "bases", seed, files) for job, files in enumerate(todo)]

    def fail(number: int, failure: str) -> None:
        content, base, mutations = make(bases, seed, number)
        report.failures.append((number, [base.name, *mutations], failure))
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{seed}-{number}.mem.gguf").write_bytes(content)

    while workers and not (stop and report.failures):
        ready = multiprocessing.connection.wait([w.pipe for w in workers], timeout=5)
        for worker in list(workers):
            if worker.pipe in ready:
                try:
                    outcome, failures = worker.pipe.recv()
                except EOFError:
                    worker.process.join()
                    code = worker.process.exitcode
                    is_hang = code in (-signal.SIGPROF, -signal.SIGKILL)
                    failure = "hang" if is_hang else f"crash: {signal.strsignal(-code) if code < 0 else code}"
                    outcome, failures = {"process": failure}, [failure]
                    worker.start(worker.files[1:])
                else:
                    worker.files.pop(0)
                    worker.began = time.monotonic()
                number = worker.current
                worker.current = worker.files[0] if worker.files else None
                report.files += 1
                report.outcomes.update(outcome.items())
                for failure in failures:
                    fail(number, failure)
                if not worker.files:
                    workers.remove(worker)
            elif time.monotonic() - worker.began > WALL_SECONDS:
                worker.process.kill()
        report.seconds = time.monotonic() - start
        progress(report)
    for worker in workers:
        worker.process.kill()
    return report


class _Worker:
    """A worker process, the files it has left, and the time at which it began the current one, the first of them."""

    def __init__(self, folder: Path, bases: Path, seed: int, files: list[int]):
        folder.mkdir()
        self.folder, self.bases, self.seed = folder, bases, seed
        self.start(files)
        self.current = files[0] if files else None

    def start(self, files: list[int]) -> None:
        self.files = files
        self.began = time.monotonic()
        self.pipe, worker_end = _SPAWN.Pipe(duplex=False)
        self.process = _SPAWN.Process(target=_work, args=(worker_end, self.folder, self.bases, self.seed, files), daemon=True)
        self.process.start()
        worker_end.close()


def _work(pipe, folder: Path, bases_path: Path, seed: int, files: list[int]) -> None:
    from .check import Checker

    bases = pickle.loads(bases_path.read_bytes())
    checker = Checker(bases, folder)
    faulthandler.enable()
    for number in files:
        content, base, _ = make(bases, seed, number)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF kills the process
        outcome = checker.check(content, base)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(outcome)


def make(bases: list[Base], seed: int, number: int) -> tuple[bytes, Base, list[str]]:
    """A file by its number: its content, its base, and its mutations in words."""
    rng = np.random.default_rng([seed, number])
    base = bases[rng.choice(len(bases), p=[b.weight for b in bases])]
    content, mutations = mutated(base.content, parse(base.content), rng)
    return content, base, mutations
