"""A process of its own for bench/decode.py: from its start to the first token. It imports what running a memory needs, no more."""

import json
import sys
import time

from attnmem_local.evaluate.scorer import Scorer

Q8_0 = 8  # ggml_type
N_LIVE = 16


def options(mode: str, memory: str) -> dict:
    """What a Scorer takes for a mode, but the prefix."""
    return {
        "none": {},
        "full": {},
        "full-q8": {"type_k": Q8_0, "type_v": Q8_0},
        "memory-scan": {"memory": memory, "lookup": "scan"},
        "memory-hnsw": {"memory": memory},
    }[mode] | {"flash_attn": True}


def main() -> None:
    """Reads what decode.py asks for from standard input, writes seconds and bytes to standard output."""
    job = json.load(sys.stdin)
    asked = options(job["mode"], job["memory"])
    memory = asked.pop("memory", None)
    prefix = job["tokens"] if job["mode"].startswith("full") else []
    scorer = Scorer(job["model"], prefix, n_threads=job["threads"], n_threads_batch=job["threads"], **asked)
    found = {"load_ms": 0.0, "attach_ms": 0.0}
    if memory:
        begun = time.perf_counter()
        loaded = scorer.llama.load_memory(memory)
        load = time.perf_counter()
        scorer.llama.attach(loaded)
        found = {"load_ms": 1000 * (load - begun), "attach_ms": 1000 * (time.perf_counter() - load)}
    next(scorer.decode(job["tokens"][:N_LIVE], 1))
    found["first_token_s"] = time.time() - job["started"]
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmHWM"))
    print(json.dumps(found | {"peak_rss_bytes": 1024 * int(peak.split()[1])}))


if __name__ == "__main__":
    main()
