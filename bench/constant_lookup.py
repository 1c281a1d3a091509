"""Quality bought by lookups alone: a fixed number of anchors, and more and more residual entries.

    .venv/bin/python bench/constant_lookup.py [--anchors 64] [--heads 12] [--json]

The README case of bench/prefixes.py, the same number of anchors in every KV head. Entries are in the heads where the error
of the anchors costs most (their sensitivity, as the budget has it), or in all. KL and NLL are measured in llama.cpp on the
F32 copy of the model, ms per token on the quantized default, token by token in turns: the median, and the median ratio to the
same token without entries with the quartiles of its means over a round.
"""

import os

import click
import numpy as np
from prefixes import CASES, FULL
from scoring import memory_path, report, score_memory

from attnmem_local.builder.budget import TOKENS, curves, uniform_plan
from attnmem_local.builder.build import fit_memory
from attnmem_local.builder.capture import capture, prefill, spread
from attnmem_local.builder.model import load_model
from attnmem_local.builder.progress import Progress
from attnmem_local.builder.sensitivity import sensitivity
from attnmem_local.evaluate.scorer import Scorer
from attnmem_local.library import DEFAULT_MODEL

ENTRIES = (0, 256, 1024, 4096)


@click.command()
@click.option("--anchors", default=64, show_default=True)
@click.option("--heads", default=12, show_default=True, help="How many KV heads have entries; 0: all.")
@click.option("--rounds", default=24, show_default=True, help="Of the timing.")
@click.option("--json", "as_json", is_flag=True)
def main(anchors: int, heads: int, rounds: int, as_json: bool) -> None:
    progress = Progress(quiet=as_json)
    case = CASES["readme"](FULL)
    model = load_model(DEFAULT_MODEL)
    kv = prefill(model, case.prefix.tokens)
    chosen = most_sensitive(model, kv, case, anchors, heads) if heads else ...
    rows, paths = [], {}
    for n in ENTRIES:
        plan = uniform_plan(model.spec, anchors=anchors, eight_bit=True)
        plan.entries[chosen] = n
        memory = fit_memory(model, case.prefix, kv, case.build_windows(), plan, progress=progress)
        name = f"constant-lookup-{heads}-{n}"
        rows.append({"entries": n, **score_memory(case, memory, name)})
        paths[n] = memory_path(name)
    ms = decode_ms(paths, case.windows[0].tokens[:32], rounds)
    for row in rows:
        own = ms[row["entries"]]
        row["ms_per_token"], row["ratio"] = float(np.median(own)), float(np.median(own / ms[0]))
        row["ratio_q1"], row["ratio_q3"] = np.percentile(own.mean(-1) / ms[0].mean(-1), [25, 75]).tolist()
    report(rows, as_json, anchors=anchors, heads=heads, threads=os.cpu_count())


def most_sensitive(model, kv, case, anchors: int, n: int) -> tuple[np.ndarray, ...]:
    """Index of the n heads [segment, layer, KV head] where so many anchors alone raise the KL most."""
    windows, offset = case.build_windows(), case.prefix.offset
    found = curves(model, kv, capture(model, kv, spread(windows, TOKENS)), offset, [0], sensitivity(model, kv, windows, seed=0))
    worst = sorted(found, key=lambda head: -found[head].at(anchors))[:n]
    return tuple(np.array(worst).T)


def decode_ms(paths: dict, live: list[int], rounds: int, n: int = 24) -> dict[int, np.ndarray]:
    """ms per token [rounds, n] with each memory."""
    scorers = {name: Scorer(DEFAULT_MODEL, memory=path, n_threads=os.cpu_count()) for name, path in paths.items()}
    ms = {name: np.empty((rounds, n)) for name in scorers}
    for i in range(rounds):
        steps = {name: scorer.decode(live, n + 1) for name, scorer in scorers.items()}
        for j in range(n + 1):
            for name in scorers:
                _, seconds = next(steps[name])
                if j:  # the first includes the live text
                    ms[name][i, j - 1] = 1000 * seconds
    return ms


if __name__ == "__main__":
    main()
