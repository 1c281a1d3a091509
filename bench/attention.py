"""The attention part of a token: the lookup of a memory and its merge, against flash attention over the prefix.

    .venv/bin/python bench/attention.py [--entries 8192 --entries 16384] [--layer 15] [--threads 2] [--json]

As many entries per KV head as the prefix has tokens. The entries are those of bench/lookup.py, queries of one layer of the
default model, in each of its layers, as the keys and values of the prefix are in each; times are of single ops in decoding,
from the callback that the runtime has for that. Tokens with the memory and with the prefix take turns. An op by itself has to
start the threads, too, which in a graph it has not: us_op is what that costs, the time of an op with next to nothing to do, and
times_faster_net is the ratio without it. With a memory: the state and flash attention over 64 to 88 live tokens. Without: flash
attention over those and the prefix. The prefill of 16,384 tokens takes some minutes. Written to results/, with its date and the
instructions that the runtime was compiled for.
"""

import ctypes
import os
import statistics
import time
from collections import defaultdict
from datetime import date
from unittest.mock import patch

import click
import llama_cpp.llama_cpp as llama_cpp
from lookup import captured, write_memory
from prefixes import BOOK, DATA, builder
from scoring import instructions, record, report

from attnmem_local.evaluate.scorer import Scorer
from attnmem_local.library import DEFAULT_MODEL

LIVE, N_DECODE = 64, 24

_op_desc = llama_cpp._lib.ggml_op_desc
_op_desc.argtypes, _op_desc.restype = [ctypes.c_void_p], ctypes.c_char_p


class OpTimer:
    """µs of each op that the runtime computes while `on`, by the name of the op."""

    def __init__(self):
        self.on = False
        self.us: dict[str, list[float]] = defaultdict(list)
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._call)

    def _call(self, tensor, ask: bool, _data) -> bool:
        if ask:
            self._start = time.perf_counter()
            return self.on  # one op at a time
        self.us[_op_desc(tensor).decode()].append(1e6 * (time.perf_counter() - self._start))
        return True

    def open(self, **context) -> Scorer:
        params = llama_cpp.llama_context_default_params()
        params.cb_eval = self.callback
        with patch.object(llama_cpp, "llama_context_default_params", return_value=params):
            return Scorer(DEFAULT_MODEL, flash_attn=True, **context)


@click.command()
@click.option("--entries", "sizes", multiple=True, type=int, default=(8192, 16384), show_default=True)
@click.option("--layer", default=15, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(sizes: tuple[int, ...], layer: int, threads: int, as_json: bool) -> None:
    known, _ = captured(layer)
    text = builder().tokenizer.encode((DATA / BOOK).read_text(encoding="utf-8")[: 8 * max(sizes)], add_bos=True)
    live, options = text[:LIVE], {"n_threads": threads, "n_threads_batch": threads}
    rows = []
    for n in sizes:
        path, _ = write_memory(known, n, range(builder().spec.block_count))
        memory, full = decode_us(live, {"memory": path, **options}, {"prefix": text[:n], **options})
        attention, op = memory["MEM_STATE"] + memory["FLASH_ATTN_EXT"], memory["ADD"]  # that of the residual stream
        rows.append(
            {
                "entries": n,
                "us_op": op,
                "us_state": memory["MEM_STATE"],
                "us_with_memory": attention,
                "us_full": full["FLASH_ATTN_EXT"],
                "times_faster": full["FLASH_ATTN_EXT"] / attention,
                "times_faster_net": (full["FLASH_ATTN_EXT"] - op) / (attention - 2 * op),
            }
        )
    about = {"date": date.today().isoformat(), "layer": layer, "threads": threads}
    record(f"attention-{instructions()}", {**about, "rows": rows})
    report(rows, as_json, **about)


def decode_us(live: list[int], *contexts: dict) -> list[dict[str, float]]:
    """Median µs of each op in decoding, of contexts that take turns token by token."""
    timers = [OpTimer() for _ in contexts]
    scorers = [timer.open(**context) for timer, context in zip(timers, contexts)]
    steps = [scorer.decode(live, N_DECODE + 1) for scorer in scorers]
    for i in range(N_DECODE + 1):
        for timer, step in zip(timers, steps):
            timer.on = i > 0  # the first includes the live text
            next(step)
    for scorer in scorers:
        scorer.close()
    return [{op: statistics.median(us) for op, us in timer.us.items()} for timer in timers]


if __name__ == "__main__":
    main()
