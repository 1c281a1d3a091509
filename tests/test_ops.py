"""The ops of the runtime against sums in double precision: tests/native/mem-state.cpp, compiled here."""

import os
import shutil
import subprocess
from pathlib import Path

import llama_cpp
import pytest
from conftest import ROOT

LIBRARIES = Path(llama_cpp.__file__).parent / "lib"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("ops") / "mem-state"
    source = Path(__file__).parent / "native/mem-state.cpp"
    include = ROOT / "build/tree/vendor/llama.cpp/ggml/include"
    libraries = ["-L", LIBRARIES, f"-Wl,-rpath,{LIBRARIES}", "-lggml", "-lggml-cpu", "-lggml-base"]
    subprocess.run([compiler, "-std=c++17", "-O2", "-I", include, source, "-o", program, *libraries], check=True)
    return program


def test_states_and_flash_attention_with_a_state(program):
    done = subprocess.run([program, "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_same_on_the_gpu(program):
    done = subprocess.run([program, "gpu"], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(f"{done.stdout.strip()}: no GPU, or built without it (./build.sh --cuda)")
    assert done.returncode == 0, done.stdout
