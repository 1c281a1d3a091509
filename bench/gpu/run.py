"""A run on a device: its sizes, its folder, its rows on disk, and the command that each stage is.

Results are kept in build/gpu row by row, so that a stage that was cut off resumes, and one that is done is not run again;
`build` begins anew when the sources have changed, and so does all that was measured with them. If OUT is set in the
environment, results are copied there as well.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import click

from ..common.paths import ROOT
from ..common.record import versions

TREE = ROOT / "build/gpu-tree"
PROGRAMS = ("tests/native/mem-state.cpp", "bench/gpu/attention.cpp")
TIMEOUT = 560  # seconds of one program: the machine may stop a command after ten minutes


@dataclass(frozen=True)
class Sizes:
    prefixes: tuple[int, ...] = (8192, 32768, 131072)  # tokens
    entries: tuple[int, ...] = (1024, 4096, 16384, 65536)  # per KV head
    batches: tuple[int, ...] = (1, 8, 32)  # sequences
    builder_prefixes: tuple[int, ...] = (8192, 32768)
    builder_windows: int = 24
    n_live: int = 32
    n_steps: int = 64
    n_ubatch: int = 2048


QUICK = Sizes((256, 512), (64, 256), (1, 4), (256,), 2, 32, 4, 256)


class Run:
    """A device, the sizes that are measured on it, and the folder of the results."""

    def __init__(self, cpu: bool, quick: bool):
        self.device, self.quick = "cpu" if cpu else "gpu", quick
        self.sizes = QUICK if quick else Sizes()
        self.folder = ROOT / "build" / f"gpu{'-cpu' if cpu else ''}{'-quick' if quick else ''}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cmake = ROOT / "build" / f"gpu{'-cpu' if cpu else ''}" / "cmake"
        self.libraries = Path(os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(self.cmake / "bin")))  # llama_cpp reads it

    def shape(self):
        from ..common import shapes  # needs llama_cpp's library in its place

        return shapes.TINY if self.quick else shapes.LLAMA_8B

    def program(self, source: Path) -> Path:
        """Compiled against the libraries of this run."""
        program = self.folder / source.stem
        options = ["-std=c++17", "-O2", "-I", TREE / "ggml/include", "-L", self.libraries, f"-Wl,-rpath,{self.libraries}"]
        subprocess.run(
            [os.environ.get("CXX", "c++"), source, "-o", program, *options, "-lggml", "-lggml-cpu", "-lggml-base"], check=True
        )
        return program


class Rows:
    """The rows of a stage, in a file that is written after each row."""

    def __init__(self, run: Run, stage: str):
        self.path = run.folder / f"{stage}.json"
        self.about = {"stage": stage, "tree": digest(), "hardware": hardware(run), "quick": run.quick}
        old = json.loads(self.path.read_text()) if self.path.exists() else {}
        same = all(old.get(key) == value for key, value in self.about.items())
        self.rows, self.done = (old["rows"], old["done"]) if same else ([], False)

    def has(self, **key) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, **row) -> None:
        shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items() if name != "output"}
        click.echo(", ".join(f"{name} {value}" for name, value in shown.items()))
        self.rows.append(row)
        self._write()

    def finish(self) -> None:
        self.done = True
        self._write()

    def _write(self) -> None:
        result = {**self.about, "date": date.today().isoformat(), "versions": versions(), "done": self.done, "rows": self.rows}
        self.path.write_text(json.dumps(result, indent=2) + "\n")
        if out := os.environ.get("OUT"):
            shutil.copy(self.path, out)


def digest() -> str:
    """A hash of the sources that are built."""
    value = hashlib.blake2b(b"".join((ROOT / name).read_bytes() for name in PROGRAMS), digest_size=8)
    for path in sorted(p for p in TREE.rglob("*") if p.is_file() and "python" not in p.relative_to(TREE).parts):
        value.update(path.relative_to(TREE).as_posix().encode() + path.read_bytes())
    return value.hexdigest()


def hardware(run: Run) -> str:
    if run.device == "cpu":
        return platform.machine()
    return output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()[0]


def output(*command) -> str:
    """What a command prints. Raises CalledProcessError or TimeoutExpired."""
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT).stdout.strip()


def stage(function: Callable[[Run, Rows], None]) -> click.Command:
    """The command of a stage, which is given its run and its rows, unless it is done."""
    name = function.__module__.rpartition(".")[2]

    @click.command(name, help=function.__doc__)
    @click.option("--cpu", is_flag=True, help="On the CPU, where there is no GPU.")
    @click.option("--quick", is_flag=True, help="A small size that shows only whether the stage works.")
    def command(cpu: bool, quick: bool) -> None:
        run = Run(cpu, quick)
        rows = Rows(run, name)
        if rows.done:
            click.echo(f"{name} is done: {rows.path}")
            return
        start = time.monotonic()
        function(run, rows)
        rows.finish()
        click.echo(f"{name}: {time.monotonic() - start:.0f} s")

    return command
