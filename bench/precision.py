"""What 8-bit tables cost: against the same anchors in half precision.

    .venv/bin/python bench/precision.py [--share 1/16] [--json]

The README case of bench/prefixes.py; llama.cpp on the F32 copy.
"""

from dataclasses import replace
from fractions import Fraction

import click
from prefixes import CASES, FULL, builder
from scoring import kv_bytes, report, score_memory

from attnmem_local.builder.budget import plan_for_bytes
from attnmem_local.builder.build import fit_memory
from attnmem_local.builder.capture import prefill
from attnmem_local.builder.progress import Progress


@click.command()
@click.option("--share", default="1/16", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(share: str, as_json: bool) -> None:
    case, model, progress = CASES["readme"](FULL), builder(), Progress(quiet=as_json)
    kv, windows = prefill(model, case.prefix.tokens), case.build_windows()

    nbytes = int(Fraction(share) * kv_bytes(case))
    plan = plan_for_bytes(model, kv, windows, nbytes, case.prefix.offset, [0], 0, progress)
    rows = []
    for tables, eight_bit in (("8 bit", True), ("half precision", False)):
        memory = fit_memory(model, case.prefix, kv, windows, replace(plan, eight_bit=eight_bit), progress=progress)
        rows.append({"tables": tables, **score_memory(case, memory, "precision")})
    report(rows, as_json, share=share)


if __name__ == "__main__":
    main()
