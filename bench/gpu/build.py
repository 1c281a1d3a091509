"""llama.cpp with CUDA, compiled from what `bench/gpu.sh pack` has put together."""

import os
import shlex
import subprocess

import click

from .run import TIMEOUT, TREE, Rows, Run, stage


@stage
def main(run: Run, rows: Rows) -> None:
    """Compile llama.cpp for the device; call it again until all is compiled."""
    off = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")]
    cuda = ["-DGGML_CUDA=OFF"] if run.device == "cpu" else shlex.split(os.environ.get("CMAKE_ARGS", ""))
    if not cuda:
        raise click.ClickException("CMAKE_ARGS is not set; bench/gpu.sh build sets it for the GPU of this machine")
    subprocess.run(["cmake", "-S", TREE, "-B", run.cmake, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *off, *cuda], check=True)
    try:
        subprocess.run(["ninja", "-C", run.cmake, "llama"], check=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise click.ClickException("not everything is compiled yet; run the same command again") from None
