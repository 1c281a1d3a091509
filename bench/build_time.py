"""How long builds take, what they say beforehand, and what less self-study costs a small prefix.

    .venv/bin/python bench/build_time.py [--case CASE ...] [--model MODEL.gguf ...] [--seeds 3] [--json]

Cases: `demo`, the prefix of `attnmem demo`; `handbook`, one of some 400 tokens; `as before`, the same with as much self-study and
tuning as the demo gets; `policy`, the first 1,643 tokens of a system prompt. A model of 1.5 billion parameters takes 12 GB.
Seconds are wall time from the call to the memory, loading the model included. `expected` is what was told, and `real` what it
was told about: the rest after the model was loaded and the estimate made. `cpu` is processor time, which other processes
lengthen less. KL, on the default model alone, is to the full prefix in PyTorch, over 24 windows of a self-study of their own.
"""

import time
from pathlib import Path

import click
from prefixes import DATA, SYSTEM_MESSAGE
from scoring import report

from attnmem_local.builder import budget
from attnmem_local.builder.build import STUDY_WINDOW, build_memory
from attnmem_local.builder.capture import prefill
from attnmem_local.builder.fidelity import held_out_fidelity
from attnmem_local.builder.model import load_model
from attnmem_local.builder.progress import Progress
from attnmem_local.builder.sensitivity import is_cached
from attnmem_local.builder.sources.self_study import self_study
from attnmem_local.cli.demo import HANDBOOK, HANDBOOK_CHARACTERS
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.prefix import Prefix
from attnmem_local.prompt.prefix import chat_prefix

SMALL = DATA.parent / "cases/inputs/handbook.md"
POLICY_TOKENS = 1643
WINDOWS = 24  # of held-out text
HELD_OUT_SEED = 1000
LONG = budget.LONG


def system(text: str) -> list[dict]:
    return [{"role": "system", "content": text}]


def policy(model) -> Prefix:
    """The first tokens of a system prompt, cut in its text so that it is a chat still."""
    text = (DATA / SYSTEM_MESSAGE).read_text(encoding="utf-8")
    frame = len(chat_prefix(model.tokenizer, system("")).tokens)
    tokens = model.tokenizer.encode(text, add_bos=False)[: POLICY_TOKENS - frame]
    return chat_prefix(model.tokenizer, system(model.tokenizer.decode(tokens)))


def demo(model) -> Prefix:
    text = HANDBOOK.read_text(encoding="utf-8")[:HANDBOOK_CHARACTERS]
    return chat_prefix(model.tokenizer, system("Answer questions about this handbook.\n\n" + text))


def handbook(model) -> Prefix:
    return chat_prefix(model.tokenizer, system(SMALL.read_text(encoding="utf-8")))


CASES = {"demo": demo, "handbook": handbook, "as before": handbook, "policy": policy}


@click.command()
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), default=tuple(CASES), help="Default: all.")
@click.option("--model", "models", multiple=True, type=click.Path(exists=True, dir_okay=False), help="Default: the default model.")
@click.option("--seeds", default=1, show_default=True, help="Builds of each case.")
@click.option("--json", "as_json", is_flag=True)
def main(cases: tuple[str, ...], models: tuple[str, ...], seeds: int, as_json: bool) -> None:
    rows = []
    for path in models or (DEFAULT_MODEL,):
        for case in cases:
            for seed in range(seeds):
                rows.append(measure(case, path, seed))
                if not as_json:
                    report(rows[-1:], as_json)
    if as_json:
        report(rows, as_json)


def measure(case: str, path, seed: int) -> dict:
    progress = Progress(quiet=True)
    budget.LONG = 1 if case == "as before" else LONG
    start, cpu = time.monotonic(), time.process_time()
    with progress.stage("load model"):
        model = load_model(path)
    prefix, cached, loaded = CASES[case](model), is_cached(model), progress.seconds["load model"]
    memory = build_memory(model, prefix, seed=seed, progress=progress)
    progress.seconds["load model"] += loaded
    wall, cpu = time.monotonic() - start, time.process_time() - cpu
    real = sum(seconds for stage, seconds in progress.seconds.items() if stage not in ("load model", "estimate"))

    fidelity = {}
    if path == DEFAULT_MODEL:
        kv = prefill(model, prefix.tokens)
        fidelity = held_out_fidelity(model, kv, memory, self_study(model, prefix, kv, WINDOWS, STUDY_WINDOW, HELD_OUT_SEED))
    return {
        "case": case,
        "model": Path(path).name,
        "prefix": len(prefix.tokens),
        "seed": seed,
        "query_tokens": memory.build["query_tokens"],
        "share": memory.nbytes() / memory.kv_bytes(),
        "sensitivity": "cached" if cached else "measured",
        "wall": wall,
        "cpu": cpu,
        "expected": progress.expected,
        "real": real,
        "stages": {stage: round(seconds, 1) for stage, seconds in progress.seconds.items()},
        **{name: fidelity.get(name) for name in ("kl_mean", "kl_none", "top1")},
        "kl_reported": memory.fidelity["kl_mean"],
    }


if __name__ == "__main__":
    main()
