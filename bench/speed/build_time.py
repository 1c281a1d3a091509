"""How long builds take, how close the estimate is, and how good the memory of a small prefix is.

Cases: `demo`, the prefix of `attnmem demo`; `handbook`, one of some 400 tokens; `full effort`, the same with as much
self-study and tuning as the demo gets; `policy`, the first 1,643 tokens of a system prompt. A model of 1.5 billion parameters
takes 12 GB of RAM. Seconds are wall time from the call to the memory, loading the model included. `expected` is what the
build said beforehand, and `real` what became of it: the time after the model was loaded and the estimate made. `cpu` is
processor time, which other processes lengthen less. KL, on the default model alone, is to the full prefix in PyTorch, over 24
windows of self-study that were not built from.
"""

import time
from contextlib import nullcontext
from pathlib import Path

import click

from attnmem_local.builder.build import build_memory
from attnmem_local.builder.model import BuildModel, load_model
from attnmem_local.builder.progress import Progress
from attnmem_local.demo import HANDBOOK_CHARACTERS
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.prefix import Prefix
from attnmem_local.prompt.prefix import chat_prefix

from ..common import record
from ..common.builder import full_effort, is_cached, study_fidelity, without_tuning
from ..common.paths import SERVER_README, SYSTEM_MESSAGE

HANDBOOK = Path(__file__).with_name("handbook.md")
POLICY_TOKENS = 1643
WINDOWS, SEED = 24, 1000  # of held-out text


def system(text: str) -> list[dict]:
    return [{"role": "system", "content": text}]


def policy(model: BuildModel) -> Prefix:
    """The first tokens of a system prompt, cut in its text so that it is a chat still."""
    text = SYSTEM_MESSAGE.read_text(encoding="utf-8")
    frame = len(chat_prefix(model.tokenizer, system("")).tokens)
    tokens = model.tokenizer.encode(text, add_bos=False)[: POLICY_TOKENS - frame]
    return chat_prefix(model.tokenizer, system(model.tokenizer.decode(tokens)))


def demo(model: BuildModel) -> Prefix:
    text = SERVER_README.read_text(encoding="utf-8")[:HANDBOOK_CHARACTERS]
    return chat_prefix(model.tokenizer, system("Answer questions about this handbook.\n\n" + text))


def handbook(model: BuildModel) -> Prefix:
    return chat_prefix(model.tokenizer, system(HANDBOOK.read_text(encoding="utf-8")))


def trial(model: BuildModel) -> Prefix:
    return chat_prefix(model.tokenizer, system(SERVER_README.read_text(encoding="utf-8")[:500]))


CASES = {"demo": demo, "handbook": handbook, "full effort": handbook, "policy": policy}


@click.command(help=__doc__)
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="[default: all]")
@click.option("--model", "models", multiple=True, type=click.Path(exists=True, dir_okay=False), help="[default: the default model]")
@click.option("--seeds", default=1, show_default=True, help="Builds of each case.")
@record.options
def main(cases: tuple[str, ...], models: tuple[str, ...], seeds: int, quick: bool, keep: bool) -> None:
    if quick:
        without_tuning()
    chosen = {"trial": trial} if quick else {name: CASES[name] for name in cases or CASES}
    rows = [
        measure(name, prefix_of, path, seed)
        for path in models or (DEFAULT_MODEL,)
        for name, prefix_of in chosen.items()
        for seed in range(seeds)
    ]
    record.finish("build-time", rows, key=("case", "model", "seed"), quick=quick, keep=keep)


def measure(case: str, prefix_of, path, seed: int) -> dict:
    progress = Progress()
    start, cpu = time.monotonic(), time.process_time()
    with progress.stage("load model"):
        model = load_model(path)
    prefix, cached, loaded = prefix_of(model), is_cached(model), progress.seconds["load model"]
    with full_effort() if case == "full effort" else nullcontext():
        memory = build_memory(model, prefix, seed=seed, progress=progress)
    progress.seconds["load model"] += loaded
    wall, cpu = time.monotonic() - start, time.process_time() - cpu
    real = sum(seconds for stage, seconds in progress.seconds.items() if stage not in ("load model", "estimate"))

    fidelity = study_fidelity(model, memory, WINDOWS, SEED) if path == DEFAULT_MODEL else {}
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
