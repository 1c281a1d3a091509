"""How a memory holds as the live text grows: KL to the full prefix over a long continuation, by distance.

    .venv/bin/python bench/distance.py MEMORY TEXT [--tokens 2000] [--bins 4] [--json]

MEMORY: of the default model. TEXT: what follows its prefix; the memory must not have been built from it. Both runs are
llama.cpp on the F32 copy of the model.
"""

from pathlib import Path

import click
import numpy as np
from prefixes import f32_model
from scoring import report

from attnmem_local.engine.tokenizer import GgufTokenizer
from attnmem_local.evaluate.scorer import Scorer, kl
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.memory import Memory


@click.command()
@click.argument("memory", type=click.Path(exists=True, path_type=Path))
@click.argument("text", type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=2000, show_default=True)
@click.option("--bins", default=4, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(memory: Path, text: Path, tokens: int, bins: int, as_json: bool) -> None:
    live = GgufTokenizer(DEFAULT_MODEL).encode(text.read_text(encoding="utf-8"), add_bos=False)[:tokens]
    runs = {"full": {"prefix": Memory.load(memory).prefix_tokens}, "memory": {"memory": memory}, "none": {}}
    log_p = {}
    for name, options in runs.items():
        scorer = Scorer(f32_model(), n_live=len(live), **options)
        log_p[name] = scorer.log_probs(live).astype(np.float32)
        scorer.close()
    rows = []
    for part in np.array_split(np.arange(len(live)), bins):
        p, q, n = (log_p[name][part].astype(np.float64) for name in ("full", "memory", "none"))
        rows.append({"first": int(part[0]), "last": int(part[-1]), "kl": float(kl(p, q).mean()), "kl_none": float(kl(p, n).mean())})
    report(rows, as_json)


if __name__ == "__main__":
    main()
