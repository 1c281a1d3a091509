"""What looked-up entries add to a fixed number of anchors: KL, bytes and time per token.

The README case, 64 anchors in each KV head, and a growing table of residuals: in the 12 heads where the error of the anchors
costs most (their sensitivity, as the budget has it), and in all heads. KL and NLL in llama.cpp on the F32 copy of the model;
ms per token on the quantized default. Memories take turns token by token; a ratio is the median over tokens of the time with
entries divided by that without, its quartiles are of the means of 24 tokens each.
"""

import os
from pathlib import Path

import click
import numpy as np

from attnmem_local.evaluate.scorer import Scorer
from attnmem_local.library import DEFAULT_MODEL

from ..common import record
from ..common.builder import most_sensitive, uniform_memory, without_tuning
from ..common.cases import FULL, QUICK, readme
from ..common.scoring import memory_path, score_memory

ANCHORS, HEADS = 64, 12
ENTRIES, ROUNDS, N_DECODE = (0, 256, 1024, 4096), 24, 24


@click.command(help=__doc__)
@record.options
def main(quick: bool, keep: bool) -> None:
    if quick:
        without_tuning()
    case = readme(QUICK if quick else FULL)
    anchors, sizes, rounds = (4, (0, 64), 1) if quick else (ANCHORS, ENTRIES, ROUNDS)
    rows = []
    for where, heads in (
        (f"{HEADS} heads", most_sensitive(case.prefix, case.build_windows, anchors, HEADS)),
        ("all heads", ...),
    ):
        paths, table = {}, []
        for n in sizes:
            memory = uniform_memory(case.prefix, case.build_windows, anchors, n, heads, eight_bit=True)
            name = f"lookup-entries-{where.replace(' ', '-')}-{n}"
            table.append({"where": where, "entries": n, **score_memory(case, memory, name)})
            paths[n] = memory_path(name)
        ms = decode_ms(paths, case.windows[0].tokens[:32], rounds)
        for row in table:
            with_entries, without = ms[row["entries"]], ms[0]
            row["ms_per_token"], row["ratio"] = float(np.median(with_entries)), float(np.median(with_entries / without))
            row["ratio_q1"], row["ratio_q3"] = np.percentile(with_entries.mean(-1) / without.mean(-1), [25, 75]).tolist()
        rows += table
    key = ("where", "entries")
    record.finish("lookup-entries", rows, key=key, quick=quick, keep=keep, anchors=anchors, threads=os.cpu_count())


def decode_ms(paths: dict[int, Path], live: list[int], rounds: int) -> dict[int, np.ndarray]:
    """ms per token [rounds, N_DECODE] with each memory."""
    scorers = {name: Scorer(DEFAULT_MODEL, memory=path, n_threads=os.cpu_count()) for name, path in paths.items()}
    ms = {name: np.empty((rounds, N_DECODE)) for name in scorers}
    for i in range(rounds):
        steps = {name: scorer.decode(live, N_DECODE + 1) for name, scorer in scorers.items()}
        for j in range(N_DECODE + 1):
            for name in scorers:
                _, seconds = next(steps[name])
                if j:  # the first includes the live text
                    ms[name][i, j - 1] = 1000 * seconds
    return ms
