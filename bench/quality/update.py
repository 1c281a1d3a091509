"""Changing one part of a prefix: an update against a full rebuild.

The README prefix in four parts of 512 tokens; the third is replaced by text from further on in the README. All memories take
an eighth of the KV bytes and are scored on the held-out windows against the full run of the changed prefix, in llama.cpp on
the F32 copy: the old memory, the updated one, and one built anew in parts.
"""

import time
from dataclasses import replace

import click

from attnmem_local.builder.build import build_memory
from attnmem_local.builder.progress import Progress
from attnmem_local.builder.update import update_memory
from attnmem_local.memory.prefix import Prefix

from ..common import record
from ..common.builder import build_model, without_tuning
from ..common.cases import FULL, QUICK, readme
from ..common.scoring import score_memory

PARTS, SHARE = 4, 1 / 8


@click.command(help=__doc__)
@record.options
def main(quick: bool, keep: bool) -> None:
    if quick:
        without_tuning()
    case, model = readme(QUICK if quick else FULL), build_model()
    tokens = case.prefix.tokens
    offset = [i * len(tokens) // PARTS for i in range(PARTS + 1)]
    old = Prefix(tokens, case.prefix.text, offset=offset)
    part = sum(case.build_text[-2:], [])[: offset[3] - offset[2]]
    changed = [*tokens[: offset[2]], *part, *tokens[offset[3] :]]
    new = Prefix(changed, model.tokenizer.decode(changed), offset=offset)
    options = {"queries": ["repeat", case.build_windows], "progress": Progress()}

    scored, rows = replace(case, prefix=new), []

    def measure(name: str, build):
        start = time.monotonic()
        memory = build()
        rows.append({"memory": name, "seconds": time.monotonic() - start, **score_memory(scored, memory, "update")})
        return memory

    before = measure("old", lambda: build_memory(model, old, share=SHARE, **options))
    measure("updated", lambda: update_memory(before, model, new, **options))
    measure("built anew in parts", lambda: build_memory(model, new, share=SHARE, **options))
    record.finish("update", rows, key=("memory",), quick=quick, keep=keep, share=SHARE)
