"""llama.cpp with CUDA, compiled from what `bench/gpu.sh pack` has put together."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click

from .run import TIMEOUT, TREE, Rows, Run, output, stage


@stage
def main(run: Run, rows: Rows) -> None:
    """Compile llama.cpp for the device; call it again until all is compiled."""
    off = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")]
    cuda = cuda_options() if run.device == "gpu" else ["-DGGML_CUDA=OFF"]
    subprocess.run(["cmake", "-S", TREE, "-B", run.cmake, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *off, *cuda], check=True)
    try:
        subprocess.run(["ninja", "-C", run.cmake, "llama"], check=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise click.ClickException("not everything is compiled yet; run the same command again") from None


def cuda_options() -> list[str]:
    """cmake's options for the GPU of this machine.

    Like use_cuda in build.sh, but for a machine without network: a toolkit without cuBLAS takes that of an installed wheel,
    such as torch brings, and one without libcuda takes the driver's.
    """
    capability = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").splitlines()[0]
    options = ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={capability.replace('.', '')}"]
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-E", "-"], input="", text=True, capture_output=True, check=True)
    toolkit = Path(next(line.split("TOP=")[1] for line in dry.stderr.splitlines() if "TOP=" in line)).resolve()
    options += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_BUILD_RPATH={toolkit}/lib64"]
    if not any(toolkit.rglob("libcuda.so")):
        driver = next((line.split()[-1] for line in output("ldconfig", "-p").splitlines() if "libcuda.so.1 " in line), None)
        options.append(f"-DCUDA_cuda_driver_LIBRARY={driver}" if driver else "-DGGML_CUDA_NO_VMM=ON")
    probe = subprocess.run(
        [nvcc, "-x", "cu", "-E", "-"], input="#include <cublas_v2.h>", text=True, capture_output=True, check=False
    )
    if probe.returncode:
        folders = [Path(p) / "nvidia" / name for p in sys.path for name in ("cu13", "cublas")]
        cublas = next((f for f in folders if (f / "include/cublas_v2.h").exists()), None)
        if cublas is None:
            raise click.ClickException(f"no cuBLAS: neither nvcc nor any python package has cublas_v2.h\n{probe.stderr}")
        options.append(f"-DCMAKE_CUDA_FLAGS=-I{cublas}/include")
        options += [f"-DCUDA_{name}_LIBRARY={next((cublas / 'lib').glob(f'lib{name}.so.*'))}" for name in ("cublas", "cublasLt")]
    return options
