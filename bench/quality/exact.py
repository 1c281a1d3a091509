"""Is the runtime exact? A memory of every key and value of a prefix, against the prefix itself.

1,000 tokens of the README of llama.cpp's server, 384 live tokens; on an F32 copy of the default model, where the runtime's
noise is 1e-6, and on the quantized default, where it is 0.003 because activations are quantized on the fly.
"""

import click

from attnmem_local.evaluate.exactness import exactness
from attnmem_local.library import DEFAULT_MODEL

from ..common import record
from ..common.cases import document, f32_model
from ..common.paths import SERVER_README

N_PREFIX, N_LIVE = 1000, 384


@click.command(help=__doc__)
@record.options
def main(quick: bool, keep: bool) -> None:
    n_prefix, n_live = (64, 32) if quick else (N_PREFIX, N_LIVE)
    _, tokens = document(SERVER_README, n_prefix + n_live)
    models = {"F32 copy": f32_model(), "Q4_1 default": DEFAULT_MODEL}
    rows = [
        {"model": name, **exactness(path, tokens[:n_prefix], tokens[n_prefix:], n_greedy=8 if quick else 64)}
        for name, path in models.items()
    ]
    record.finish("exact", rows, key=("model",), quick=quick, keep=keep)
