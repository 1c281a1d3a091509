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

    device = "cpu" if run.device == "cpu" else "cuda"
    model = random_model(run, device)
    for n in run.sizes.builder_prefixes:
        if rows.has(prefix_tokens=n):
            continue
        tokens = np.random.default_rng(n).integers(300, run.shape().n_vocab, n).tolist()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        progress = Progress()
        start = time.monotonic()
        with (
            tempfile.TemporaryDirectory() as cache,
            patch.dict(os.environ, XDG_CACHE_HOME=cache),
        ):  # so that sensitivity is measured anew
            memory = build_memory(model, Prefix(tokens, "random"), windows=run.sizes.builder_windows, progress=progress)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        seconds = time.monotonic() - start
        rows.add(prefix_tokens=n, seconds=seconds, peak_bytes=peak, memory_bytes=memory.nbytes(), stages=progress.seconds)


def random_model(run: Run, device: str):
    """A BuildModel of random weights, whose tokenizer gives random text."""
    import torch
    import transformers

    from attnmem_local.builder.attention import ATTENTION_NAME
    from attnmem_local.builder.model import BuildModel, _spec

    shape = run.shape()
    config = transformers.LlamaConfig(
        num_hidden_layers=shape.n_layer,
        hidden_size=shape.n_embd,
        intermediate_size=shape.n_ff,
        num_attention_heads=shape.n_head,
        num_key_value_heads=shape.n_head_kv,
        head_dim=shape.d,
        vocab_size=shape.n_vocab,
        max_position_embeddings=262144,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)

    class Tokenizer:
        def encode(self, text: str, add_bos: bool) -> list[int]:
            return np.random.default_rng(len(text)).integers(300, shape.n_vocab, 16).tolist()

        def decode(self, tokens: list[int]) -> str:
            return ""

    spec = _spec(config, norms="random", vocab="random")
    return BuildModel(module.to(device).eval().requires_grad_(False), Tokenizer(), spec, interleaved=True)
