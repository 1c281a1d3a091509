"""Where things are: sources, results, and what is computed once and kept."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build/bench"  # models, memories and measurements that later runs take up again
RESULTS = ROOT / "bench/results"
SERVER_README = ROOT / "build/tree/vendor/llama.cpp/tools/server/README.md"
DATA = Path(os.environ.get("ATTNMEM_DATA", ROOT / "build/data"))  # texts and tasks that are not in the repository
BOOK = DATA / "books/pride_and_prejudice.unwrapped.txt"
SYSTEM_MESSAGE = DATA / "system_prompts/code_review_agent_role.md"
BANKING77 = DATA / "banking77"

BUILD.mkdir(parents=True, exist_ok=True)
