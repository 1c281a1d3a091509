"""Query sources compared: what to build from when there are no traces, more of it, and what traces add.

    .venv/bin/python bench/queries.py [--prefix readme] [--source traces] [--share 1/8] [--json]

A memory of the same size from each source, scored on the same held-out text, llama.cpp on the F32 copy. `default` is repeat
and 24 windows of self-study, as prefixes of 2,256 tokens and more get them. Traces are the build text of prefixes.py, which is
text of the same kind as the scored one; the chat has none.
"""

from fractions import Fraction

import click
from prefixes import CASES, FULL, builder
from scoring import report, score_memory

from attnmem_local.builder.build import build_memory
from attnmem_local.builder.progress import Progress

SOURCES = {  # sources, and windows of self-study
    "default": (["repeat", "self-study"], 24),
    "twice the self-study": (["repeat", "self-study"], 48),
    "self-study": (["self-study"], 24),
    "repeat": (["repeat"], 24),
    "traces": (["traces"], 24),
}


@click.command()
@click.option("--prefix", "names", multiple=True, type=click.Choice(list(CASES)), default=("readme", "chat"), show_default=True)
@click.option("--source", "labels", multiple=True, type=click.Choice(list(SOURCES)), default=tuple(SOURCES), help="Default: all.")
@click.option("--share", default="1/8", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(names: tuple[str, ...], labels: tuple[str, ...], share: str, as_json: bool) -> None:
    rows = []
    for name in names:
        case = CASES[name](FULL)
        for label in labels:
            sources, windows = SOURCES[label]
            if "traces" in sources and case.build_text is None:
                continue
            queries = [case.build_text if source == "traces" else source for source in sources]
            memory = build_memory(
                builder(),
                case.prefix,
                queries=queries,
                windows=windows,
                share=float(Fraction(share)),
                progress=Progress(quiet=as_json),
            )
            about = {
                "prefix": name,
                "queries": label,
                "tokens": memory.build["query_tokens"],
                "held_out_kl": memory.fidelity.get("kl_mean"),
            }
            rows.append(about | score_memory(case, memory, "queries"))
    report(rows, as_json, share=share)


if __name__ == "__main__":
    main()
