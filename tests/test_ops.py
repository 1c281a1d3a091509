"""The ops of the runtime against sums in double precision: tests/native/mem-state.cpp, compiled here."""

import os
import shutil
import subprocess
from pathlib import Path

import llama_cpp
import pytest
from conftest import ROOT

LIBRARIES = Path(llama_cpp.__file__).parent / "lib"


def test_states_and_flash_attention_with_a_state(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "mem-state"
    source = Path(__file__).parent / "native/mem-state.cpp"
    include = ROOT / "build/tree/vendor/llama.cpp/ggml/include"
    libraries = ["-L", LIBRARIES, f"-Wl,-rpath,{LIBRARIES}", "-lggml-cpu", "-lggml-base"]
    subprocess.run([compiler, "-std=c++17", "-O2", "-I", include, source, "-o", program, *libraries], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
