"""The ops of the runtime against sums in double precision: tests/native/mem-state.cpp, compiled here."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import llama_cpp
import pytest
from helpers.paths import ROOT

pytestmark = pytest.mark.slow  # each test compiles a program

LIBRARIES = Path(llama_cpp.__file__).parent / "lib"
NATIVE = Path(__file__).parent / "native"
GGML = ROOT / "build/tree/vendor/llama.cpp/ggml"


def compiled(program: Path, *options) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    libraries = ["-L", LIBRARIES, f"-Wl,-rpath,{LIBRARIES}", "-lggml", "-lggml-cpu", "-lggml-base"]
    options = ["-std=c++17", "-O2", "-I", GGML / "include", *options]
    subprocess.run([compiler, *options, NATIVE / "mem-state.cpp", "-o", program, *libraries], check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("ops") / "mem-state")


def test_states_and_flash_attention_with_a_state(program):
    done = subprocess.run([program, "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


INSTRUCTION_SETS = {
    "x86-64": set(),
    "haswell": {"avx2", "fma", "f16c"},
    "skylake-avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


@pytest.mark.parametrize("march", INSTRUCTION_SETS)
def test_the_kernels_of_other_cpus(march, tmp_path):
    """The op compiled for less than this CPU has: the generic kernels, and those of each instruction set; every case in 10."""
    if platform.machine() != "x86_64":
        pytest.skip("only x86 has kernels of its own")
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    if not INSTRUCTION_SETS[march] <= set(flags):
        pytest.skip(f"this CPU does not run code for {march}")
    options = ["-DKERNELS", "-D_GNU_SOURCE", f"-march={march}", "-I", GGML / "src", "-I", GGML / "src/ggml-cpu"]
    done = subprocess.run([compiled(tmp_path / "kernels", *options), "cpu", "10"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_same_on_the_gpu(program):
    done = subprocess.run([program, "gpu"], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"{done.stdout.strip()}: no GPU, or built without it (./build.sh --cuda)")
    assert done.returncode == 0, done.stdout


def test_the_cuda_op_emulated(tmp_path):
    """The kernels of the CUDA op as threads that take turns on the CPU: every case in 25."""
    options = [
        "-DEMULATED",
        "-U_FORTIFY_SOURCE",
        "-Wno-unknown-pragmas",  # fibers jump between stacks
        "-I",
        NATIVE / "cuda-emulation",
        "-I",
        GGML / "src",
    ]
    done = subprocess.run([compiled(tmp_path / "emulated", *options), "gpu", "25"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
