"""Changing one part of a prefix: attnmem update against a full rebuild.

    .venv/bin/python bench/update.py [--share 1/8] [--json]

The README prefix of prefixes.py in four parts of 512 tokens; the third is replaced by text from further on in the README.
Scored on the held-out windows against the full run of the changed prefix, llama.cpp on the F32 copy: the memory that was
updated, one that was built anew in parts, and the old one.
"""

import time
from dataclasses import replace
from fractions import Fraction

import click
from prefixes import CASES, FULL, builder
from scoring import report, score_memory

from attnmem_local.builder.build import build_memory
from attnmem_local.builder.progress import Progress
from attnmem_local.builder.update import update_memory
from attnmem_local.memory.prefix import Prefix

PARTS = 4


@click.command()
@click.option("--share", default="1/8", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(share: str, as_json: bool) -> None:
    case, model, progress = CASES["readme"](FULL), builder(), Progress(quiet=as_json)
    tokens = case.prefix.tokens
    offset = [i * len(tokens) // PARTS for i in range(PARTS + 1)]
    old = Prefix(tokens, case.prefix.text, offset=offset)
    part = sum(case.build_text[-2:], [])[: offset[3] - offset[2]]
    changed = [*tokens[: offset[2]], *part, *tokens[offset[3] :]]
    new = Prefix(changed, model.tokenizer.decode(changed), offset=offset)
    options = {"queries": ["repeat", case.build_windows()], "progress": progress}
    size = {"share": float(Fraction(share))}

    memories, seconds = {}, {}

    def timed(name, build):
        start = time.monotonic()
        memories[name] = build()
        seconds[name] = time.monotonic() - start

    timed("old", lambda: build_memory(model, old, **size, **options))
    timed("updated", lambda: update_memory(memories["old"], model, new, **options))
    timed("built anew in parts", lambda: build_memory(model, new, **size, **options))
    scored = replace(case, prefix=new)
    rows = [
        {"memory": name, "seconds": seconds[name], **score_memory(scored, memory, "update")} for name, memory in memories.items()
    ]
    report(rows, as_json, share=share)


if __name__ == "__main__":
    main()
