"""The attention part of a token: the lookup of a memory and its merge, against flash attention over the prefix.

As many entries per KV head as the prefix has tokens: queries of one layer of the default model (as in search.py), put into
all layers, as the prefix has keys and values in all. Times are of single ops in decoding, from the runtime's own callback;
tokens with the memory and with the prefix take turns. With a memory: its state, and flash attention over 64 to 88 live
tokens. Without: flash attention over those and the prefix. Running an op alone also wakes the thread pool, which it would not
do inside a graph: us_op estimates that overhead with a near-empty op, and times_faster_net is the ratio without it.
"""

import ctypes
import os
import statistics
import time
from collections import defaultdict
from unittest.mock import patch

import click
import llama_cpp.llama_cpp as llama_cpp

from attnmem_local.evaluate.scorer import Scorer
from attnmem_local.library import DEFAULT_MODEL

from ..common import record
from ..common.builder import build_model
from ..common.cases import document
from ..common.paths import BOOK, SERVER_README
from .search import LAYER, live_queries, write_memory

SIZES = (8192, 16384)
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


@click.command(help=__doc__)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@record.options
def main(threads: int, quick: bool, keep: bool) -> None:
    sizes = (256,) if quick else SIZES
    known, _ = live_queries(max(sizes))
    _, text = document(SERVER_README if quick else BOOK, max(sizes))
    context = {"n_threads": threads, "n_threads_batch": threads}
    rows = []
    for n in sizes:
        path = write_memory(known, n, range(build_model().spec.block_count))
        memory, full = decode_us(text[:LIVE], {"memory": path, **context}, {"prefix": text[:n], **context})
        attention, op = memory["MEM_STATE"] + memory["FLASH_ATTN_EXT"], memory["ADD"]  # ADD: of the residual stream
        row = {"entries": n, "us_op": op, "us_state": memory["MEM_STATE"], "us_with_memory": attention}
        row |= {"us_full": full["FLASH_ATTN_EXT"], "times_faster": full["FLASH_ATTN_EXT"] / attention}
        rows.append(row | {"times_faster_net": (full["FLASH_ATTN_EXT"] - op) / (attention - 2 * op)})
    claim = f"attention.{record.instructions()}"
    record.finish(claim, rows, key=("entries",), quick=quick, keep=keep, layer=LAYER, threads=threads)


def decode_us(live: list[int], *contexts: dict) -> list[dict[str, float]]:
    """Median µs of each op in decoding, in contexts that take turns token by token."""
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
