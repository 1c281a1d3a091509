"""Two memories of two documents attached together, each scored on the text of its own document.

    .venv/bin/python bench/composition.py [--share 1/8] [--json]

The README and the novel of prefixes.py, with the memories that bench/fidelity.py builds; llama.cpp on the F32 copy.
"""

from fractions import Fraction

import click
from fidelity import attnmem
from prefixes import CASES, FULL, f32_model
from scoring import report, score


@click.command()
@click.option("--share", default="1/8", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(share: str, as_json: bool) -> None:
    cases = [CASES[name](FULL) for name in ("readme", "novel")]
    for case in cases:
        attnmem(case, float(Fraction(share)))
    paths = [case.folder / f"attnmem {float(Fraction(share)):.5f}.mem.gguf" for case in cases]
    rows = []
    for case, own in zip(cases, paths):
        other = paths[1 - paths.index(own)]
        alone, together = (score(case, f32_model(), memory=memory)["nll"] for memory in (own, [own, other]))
        rows.append({"document": case.name, "alone": alone, "together": together, "change": together / alone - 1})
    report(rows, as_json, share=share)


if __name__ == "__main__":
    main()
