"""Query sources compared: what to build from when there are no traces, and what traces add.

    .venv/bin/python bench/queries.py [--prefix readme] [--share 1/16] [--json]

A memory of the same size from each source, scored on the same held-out text, llama.cpp on the F32 copy. Traces are the
build text of prefixes.py, which is text of the same kind as the scored one; the chat has none.
"""

import json
from fractions import Fraction

import click

from attnmem_local.build import build_memory
from attnmem_local.progress import Progress
from prefixes import BUILD, CASES, FULL, builder, f32_model
from scoring import score

SOURCES = {
    "repeat": ["repeat"],
    "self-study": ["self-study"],
    "repeat, self-study": ["repeat", "self-study"],
    "traces": ["traces"],
    "repeat, traces": ["repeat", "traces"],
}


@click.command()
@click.option("--prefix", "names", multiple=True, type=click.Choice(list(CASES)), default=("readme", "chat"), show_default=True)
@click.option("--share", default="1/16", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(names: tuple[str, ...], share: str, as_json: bool) -> None:
    rows = []
    for name in names:
        case = CASES[name](FULL)
        for label, sources in SOURCES.items():
            if "traces" in sources and case.build_text is None:
                continue
            queries = [case.build_text if source == "traces" else source for source in sources]
            path = BUILD / "bench-queries.mem.gguf"
            memory = build_memory(builder(), case.prefix, path, queries=queries, share=float(Fraction(share)), progress=Progress(quiet=as_json))
            found = score(case, f32_model(), memory=path)
            rows.append({"prefix": name, "queries": label, "tokens": memory.build["query_tokens"], "held_out_kl": memory.fidelity.get("kl_mean")} | found)
            if not as_json:
                click.echo(f"{name:8} {label:20} {rows[-1]['tokens']:6} tokens, KL {found['kl']:.5f}, NLL {found['nll']:.4f}")
    if as_json:
        click.echo(json.dumps({"share": share, "rows": rows}))


if __name__ == "__main__":
    main()
