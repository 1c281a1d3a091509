"""What to build from: query sources compared without traces, more of them, and what traces add.

A memory of an eighth of the KV bytes from each source, scored on the same held-out text, in llama.cpp on the F32 copy.
`default` is the prefix repeated and 24 windows of self-study, as prefixes of 2,048 tokens and more get them. Traces are later
passages of the scored document (bench/common/cases.py); the chat has none.
"""

import click

from attnmem_local.builder.build import build_memory
from attnmem_local.builder.progress import Progress

from ..common import record
from ..common.builder import build_model, without_tuning
from ..common.cases import CASES, FULL, QUICK
from ..common.scoring import score_memory

SHARE = 1 / 8
SOURCES = {  # sources, and windows of self-study
    "default": (["repeat", "self-study"], 24),
    "twice the self-study": (["repeat", "self-study"], 48),
    "self-study": (["self-study"], 24),
    "repeat": (["repeat"], 24),
    "traces": (["traces"], 24),
}


@click.command(help=__doc__)
@click.option("--prefix", "names", multiple=True, type=click.Choice(list(CASES)), help="[default: readme]")
@click.option("--source", "labels", multiple=True, type=click.Choice(list(SOURCES)), help="[default: all]")
@record.options
def main(names: tuple[str, ...], labels: tuple[str, ...], quick: bool, keep: bool) -> None:
    if quick:
        without_tuning()
    rows = []
    for name in names or ("readme",):
        case = CASES[name](QUICK if quick else FULL)
        for label in labels or (("repeat", "traces") if quick else SOURCES):
            sources, windows = SOURCES[label]
            if "traces" in sources and case.build_text is None:
                continue
            memory = build_memory(
                build_model(),
                case.prefix,
                queries=[case.build_text if source == "traces" else source for source in sources],
                windows=windows,
                share=SHARE,
                progress=Progress(),
            )
            built = {"tokens": memory.build["query_tokens"], "kl_reported": memory.fidelity.get("kl_mean")}
            rows.append({"prefix": name, "built_from": label, **built, **score_memory(case, memory, "sources")})
    record.finish("sources", rows, key=("prefix", "built_from"), quick=quick, keep=keep, share=SHARE)
