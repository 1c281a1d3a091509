"""Quality bought by lookups alone: a fixed number of anchors, and more and more residual entries.

    .venv/bin/python bench/constant_lookup.py [--anchors 64] [--json]

The README case of bench/prefixes.py, every KV head alike. KL and NLL are measured in llama.cpp on the F32 copy of the
model, ms per token on the quantized default, in turns within one run, and as the median ratio of a turn to that without
entries, with its quartiles.
"""

import os
import statistics

import click
import numpy as np

from attnmem_local.budget import uniform_plan
from attnmem_local.build import fit_memory
from attnmem_local.capture import prefill
from attnmem_local.cli.common import DEFAULT_MODEL
from attnmem_local.evaluate import Scorer
from attnmem_local.model import load_model
from attnmem_local.progress import Progress
from prefixes import CASES, FULL
from scoring import memory_path, report, score_memory

ENTRIES = (0, 256, 1024, 4096)


@click.command()
@click.option("--anchors", default=64, show_default=True)
@click.option("--rounds", default=24, show_default=True, help="Of the timing.")
@click.option("--json", "as_json", is_flag=True)
def main(anchors: int, rounds: int, as_json: bool) -> None:
    progress = Progress(quiet=as_json)
    case = CASES["readme"](FULL)
    model = load_model(DEFAULT_MODEL)
    kv = prefill(model, case.prefix.tokens)
    rows, paths = [], {}
    for n in ENTRIES:
        plan = uniform_plan(model.spec, anchors=anchors, entries=n, eight_bit=True)
        memory = fit_memory(model, case.prefix, kv, case.build_windows(), plan, progress=progress)
        rows.append({"entries": n, **score_memory(case, memory, f"constant-lookup-{n}")})
        paths[n] = memory_path(f"constant-lookup-{n}")
    ms = decode_ms(paths, case.windows[0].tokens[:32], rounds)
    for row in rows:
        own = ms[row["entries"]]
        row["ms_per_token"] = float(np.median(own))
        row["ratio_q1"], row["ratio"], row["ratio_q3"] = np.percentile(own / ms[0], [25, 50, 75]).tolist()
    report(rows, as_json, anchors=anchors, threads=os.cpu_count())


def decode_ms(paths: dict, live: list[int], rounds: int, n: int = 24) -> dict[int, np.ndarray]:
    """Median ms per token of each round with each memory, taken in turns."""
    scorers = {name: Scorer(DEFAULT_MODEL, memory=path, n_threads=os.cpu_count()) for name, path in paths.items()}
    ms: dict[int, list[float]] = {name: [] for name in scorers}
    for _ in range(rounds):
        for name, scorer in scorers.items():
            ms[name].append(1000 * statistics.median(seconds for _, seconds in list(scorer.decode(live, n))[1:]))
    return {name: np.array(values) for name, values in ms.items()}


if __name__ == "__main__":
    main()
