"""Paths of files that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SERVER_README = ROOT / "build/tree/vendor/llama.cpp/tools/server/README.md"
