"""What 8-bit tables cost, and what they buy: the same anchors in half precision, and half precision for the same bytes.

    .venv/bin/python bench/precision.py [--share 1/16] [--json]

The README case of bench/prefixes.py; llama.cpp on the F32 copy.
"""

import json
from dataclasses import replace
from fractions import Fraction

import click

from attnmem_local.budget import head_bytes, plan_for_bytes
from attnmem_local.build import fit_memory
from attnmem_local.capture import prefill
from attnmem_local.progress import Progress
from prefixes import BUILD, CASES, FULL, builder, f32_model
from scoring import kv_bytes, score


@click.command()
@click.option("--share", default="1/16", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(share: str, as_json: bool) -> None:
    case, model, progress = CASES["readme"](FULL), builder(), Progress(quiet=as_json)
    kv, windows = prefill(model, case.prefix.tokens), case.build_windows()

    def plan(nbytes: int):
        return plan_for_bytes(model, kv, windows, nbytes, case.prefix.offset, [0], 0, progress)

    nbytes = int(Fraction(share) * kv_bytes(case))
    eight, half = (head_bytes(model.spec, 1, len(case.prefix.tokens), eight_bit) for eight_bit in (True, False))
    eight_bit = plan(nbytes)
    plans = {
        "8 bit": eight_bit,
        "half precision, the same anchors": replace(eight_bit, eight_bit=False),
        "half precision, the same bytes": replace(plan(nbytes * eight // half), eight_bit=False),
    }
    rows = []
    for name, chosen in plans.items():
        memory = fit_memory(model, case.prefix, kv, windows, chosen, progress=progress)
        path = BUILD / "bench-precision.mem.gguf"
        memory.save(path)
        rows.append({"tables": name, "bytes": memory.nbytes(), **score(case, f32_model(), memory=path)})
        if not as_json:
            click.echo(f"{name:33} {rows[-1]['bytes'] / 1e6:.2f} MB, KL {rows[-1]['kl']:.5f}, NLL {rows[-1]['nll']:.4f}")
    if as_json:
        click.echo(json.dumps({"share": share, "rows": rows}))


if __name__ == "__main__":
    main()
