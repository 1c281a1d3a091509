"""Query sources compared: what to build from when there are no traces, more of it, and what traces add.

    .venv/bin/python bench/queries.py [--prefix readme] [--share 1/8] [--json]

A memory of the same size from each source, scored on the same held-out text, llama.cpp on the F32 copy. The default is
repeat and 24 windows of self-study. Traces are the build text of prefixes.py, which is text of the same kind as the scored
one; the chat has none.
"""

import json
from fractions import Fraction

import click

from attnmem_local.build import build_memory
from attnmem_local.progress import Progress
from prefixes import BUILD, CASES, FULL, builder, f32_model
from scoring import score

SOURCES = {  # sources, and windows of self-study
    "default": (["repeat", "self-study"], 24),
    "twice the self-study": (["repeat", "self-study"], 48),
    "self-study": (["self-study"], 24),
    "repeat": (["repeat"], 24),
    "traces": (["traces"], 24),
}


@click.command()
@click.option("--prefix", "names", multiple=True, type=click.Choice(list(CASES)), default=("readme", "chat"), show_default=True)
@click.option("--share", default="1/8", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(names: tuple[str, ...], share: str, as_json: bool) -> None:
    rows = []
    for name in names:
        case = CASES[name](FULL)
        for label, (sources, windows) in SOURCES.items():
            if "traces" in sources and case.build_text is None:
                continue
            queries = [case.build_text if source == "traces" else source for source in sources]
            path = BUILD / "bench-queries.mem.gguf"
            options = {"queries": queries, "windows": windows, "share": float(Fraction(share))}
            memory = build_memory(builder(), case.prefix, path, progress=Progress(quiet=as_json), **options)
            found = score(case, f32_model(), memory=path)
            tokens, held_out = memory.build["query_tokens"], memory.fidelity.get("kl_mean")
            rows.append({"prefix": name, "queries": label, "tokens": tokens, "held_out_kl": held_out} | found)
            if not as_json:
                click.echo(f"{name:8} {label:20} {tokens:6} tokens, KL {found['kl']:.5f}, NLL {found['nll']:.4f}")
    if as_json:
        click.echo(json.dumps({"share": share, "rows": rows}))


if __name__ == "__main__":
    main()
