"""Seconds and device memory of a build, for a model with random weights."""

import os
import tempfile
import time
from unittest.mock import patch

import numpy as np

from .run import Rows, Run, stage


@stage
def main(run: Run, rows: Rows) -> None:
    """Seconds and device memory of building for prefixes of 8K and 32K tokens."""
    import torch

    from attnmem_local.builder.build import build_memory
    from attnmem_local.builder.progress import Progress
    from attnmem_local.memory.prefix import Prefix

    from ..common.builder import random_model

    device = "cpu" if run.device == "cpu" else "cuda"
    model = random_model(run.shape(), device)
    for n in run.sizes.builder_prefixes:
        if rows.has(prefix_tokens=n):
            continue
        tokens = np.random.default_rng(n).integers(300, run.shape().n_vocab, n).tolist()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        progress = Progress()
        start = time.monotonic()
        # an empty cache, so that the sensitivity of the model is measured
        with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, XDG_CACHE_HOME=cache):
            memory = build_memory(model, Prefix(tokens, "random"), windows=run.sizes.builder_windows, progress=progress)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        seconds = time.monotonic() - start
        rows.add(prefix_tokens=n, seconds=seconds, peak_bytes=peak, memory_bytes=memory.nbytes(), stages=progress.seconds)
