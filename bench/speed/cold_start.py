"""A fresh process for decode.py: from its start to the first token. It imports only what running a memory needs."""

import json
import sys
import time

from attnmem_local.evaluate.scorer import Scorer

Q8_0 = 8  # ggml_type
N_LIVE = 16


def options(mode: str, memory: str) -> dict:
    """What a Scorer takes for a mode, apart from the prefix."""
    return {
        "none": {},
        "full": {},
        "full-q8": {"type_k": Q8_0, "type_v": Q8_0},
        "memory": {"memory": memory},
    }[mode] | {"flash_attn": True}


def main() -> None:
    """Reads the job of decode.py from standard input, writes seconds and bytes to standard output."""
    job = json.load(sys.stdin)
    context = options(job["mode"], job["memory"])
    memory = context.pop("memory", None)
    prefix = job["tokens"] if job["mode"].startswith("full") else []
    scorer = Scorer(job["model"], prefix, n_threads=job["threads"], n_threads_batch=job["threads"], **context)
    result = {"load_ms": 0.0, "attach_ms": 0.0}
    if memory:
        start = time.perf_counter()
        loaded = scorer.llama.load_memory(memory)
        after_load = time.perf_counter()
        scorer.llama.attach(loaded)
        result = {"load_ms": 1000 * (after_load - start), "attach_ms": 1000 * (time.perf_counter() - after_load)}
    next(scorer.decode(job["tokens"][:N_LIVE], 1))
    result["first_token_s"] = time.time() - job["started"]
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmHWM"))
    print(json.dumps(result | {"peak_rss_bytes": 1024 * int(peak.split()[1])}))


if __name__ == "__main__":
    main()
