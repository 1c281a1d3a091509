"""NVIDIA kvpress, in an environment of its own: it wants an older transformers than the builder."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from prefixes import BUILD, Case, f32_model

VENV = BUILD / "kvpress-venv"
PYTHON = VENV / "bin/python"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PRESSES = ("Knorm", "SnapKV", "ExpectedAttention", "KVzip", "AdaKV-ExpectedAttention")


def kvpress(case: Case, share: float, press: str) -> dict:
    """Raises RuntimeError with what the press says when it fails."""
    process = _process(case)
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
    install()
    job = {
        "gguf": str(f32_model()),
        "prefix": case.prefix.tokens,
        "chat": case.prefix.messages is not None,
        "windows": [{"tokens": w.tokens, "n_given": w.n_given} for w in case.windows],
    }
    path = case.folder / "kvpress-job.json"
    path.write_text(json.dumps(job))
    script = Path(__file__).with_name("kvpress_run.py")
    command = [PYTHON, script, path]
    quiet = os.environ | {"TQDM_DISABLE": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet)


def install() -> None:
    """Make the environment, once per content of requirements.txt."""
    stamp = VENV / "installed.txt"
    if stamp.exists() and stamp.read_text() == REQUIREMENTS.read_text():
        return
    subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "-q", "-r", REQUIREMENTS], check=True)
    stamp.write_text(REQUIREMENTS.read_text())


def versions() -> dict[str, str]:
    names = ("kvpress", "torch", "transformers")
    code = f"from importlib.metadata import version; print(*map(version, {names}))"
    found = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True).stdout.split() if PYTHON.exists() else ()
    return {name if name == "kvpress" else f"{name} for kvpress": value for name, value in zip(names, found)}
