"""Presses of NVIDIA kvpress, in an environment apart: they need an older transformers than the builder."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import torch

from ..common.cases import Case, f32_model
from ..common.paths import BUILD, ROOT

VENV = BUILD / "kvpress-venv"
PYTHON = VENV / "bin/python"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PRESSES = ("Knorm", "SnapKV", "ExpectedAttention", "KVzip", "AdaKV-ExpectedAttention")


def kvpress(case: Case, share: float, press: str) -> dict:
    """Raises RuntimeError with what the press says when it fails."""
    return run(_process(case), press, share)


def run(process: subprocess.Popen, press: str, share: float) -> dict:
    process.stdin.write(f"{press} {share}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    result = json.loads(line) if line else {"error": "the process ended"}
    if "error" in result:
        raise RuntimeError(result["error"])
    return result


@lru_cache(maxsize=1)
def _process(case: Case) -> subprocess.Popen:
    """Runs presses on one case until its standard input is closed."""
    windows = [{"tokens": w.tokens, "n_given": w.n_given} for w in case.windows]
    return start(case, f32_model(), case.prefix.messages is not None, windows=windows)


def start(case, model: Path, chat: bool, **job) -> subprocess.Popen:
    """kvpress_run.py on a job, whose fields it describes; case: anything with a prefix and a folder."""
    install()
    path = case.folder / "kvpress-job.json"
    path.write_text(json.dumps({"gguf": str(model), "prefix": case.prefix.tokens, "chat": chat, **job}))
    command = [PYTHON, Path(__file__).with_name("kvpress_run.py"), path]
    environment = os.environ | {"TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def install() -> None:
    """Make the environment, once per content of requirements.txt."""
    stamp = VENV / "installed.txt"
    if stamp.exists() and stamp.read_text() == REQUIREMENTS.read_text():
        return
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "-q", "-r", REQUIREMENTS], check=True)
    stamp.write_text(REQUIREMENTS.read_text())


def versions() -> dict[str, str]:
    """Of kvpress and what it runs on; empty without its environment."""
    names = ("kvpress", "torch", "transformers")
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    if not PYTHON.exists():
        return {}
    return dict(zip(names, subprocess.run([PYTHON, "-c", code], capture_output=True, text=True).stdout.split()))
