"""ms per step of a model with random weights, with a prefix, with a memory, and without both, for batches of sequences."""

import statistics
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

from .attention import attention_bytes
from .run import Rows, Run, stage


@stage
def main(run: Run, rows: Rows) -> None:
    """ms per token of random weights with the shape of Llama-3.1-8B in Q4_0."""
    import gguf

    from ..common.shapes import lookup_memory, model_spec, write_llama

    model = run.folder / "model.gguf"
    shape = run.shape()
    if not model.exists():
        part = model.with_suffix(".part")
        write_llama(part, shape)
        part.rename(model)
    spec = model_spec(gguf.GGUFReader(model))
    decoder = Decoder(run, model)

    def measure(what: str, n: int) -> None:
        for batch in run.sizes.batches:
            if not rows.has(what=what, n=n, batch=batch):
                nbytes = model.stat().st_size + shape.n_layer * attention_bytes(shape, what, n, batch)
                rows.add(what=what, n=n, batch=batch, ms_per_step=decoder.ms_per_step(batch), bytes=nbytes)

    measure("none", 0)
    for n in run.sizes.entries:
        if all(rows.has(what="memory", n=n, batch=batch) for batch in run.sizes.batches):
            continue
        path = run.folder / "memory.mem.gguf"
        lookup_memory(spec, n).save(path)
        decoder.llama.attach(path)
        measure("memory", n)
        decoder.llama.detach()
        path.unlink()
    for n in run.sizes.prefixes:
        decoder.extend_prefix(n)
        measure("prefix", n)


class Decoder:
    """A model that decodes batches of sequences with a common prefix of random tokens."""

    def __init__(self, run: Run, model: Path):
        import llama_cpp.llama_cpp as api

        from attnmem_local.runtime.llama import MemoryLlama

        self.api, self.sizes = api, run.sizes
        params = api.llama_context_default_params()
        params.n_seq_max, params.kv_unified = max(run.sizes.batches), True
        with patch.object(api, "llama_context_default_params", return_value=params):
            self.llama = MemoryLlama(
                str(model),
                n_ctx=max(run.sizes.prefixes) + max(run.sizes.batches) * (run.sizes.n_live + run.sizes.n_steps),
                n_batch=run.sizes.n_ubatch,
                n_ubatch=run.sizes.n_ubatch,
                n_gpu_layers=0 if run.device == "cpu" else -1,
                flash_attn=True,
                verbose=False,
            )
        self.kv = api.llama_get_memory(self.llama.ctx)
        self.batch = api.llama_batch_init(run.sizes.n_ubatch, 0, 1)
        self.n_prefix = 0
        self.random = np.random.default_rng(0)

    def run(self, cells: list[tuple[int, int]], logits: bool) -> float:
        """Seconds for random tokens at (sequence, position)."""
        batch = self.batch
        batch.n_tokens = len(cells)
        for i, (sequence, position) in enumerate(cells):
            batch.token[i] = int(self.random.integers(300, self.llama.n_vocab()))
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = position, 1, sequence, logits
        start = time.perf_counter()
        if code := self.api.llama_decode(self.llama.ctx, batch):
            raise RuntimeError(f"llama_decode failed with {code}")
        self.api.llama_synchronize(self.llama.ctx)
        return time.perf_counter() - start

    def extend_prefix(self, n: int) -> None:
        """To n tokens, in sequence 0."""
        while self.n_prefix < n:
            end = min(self.n_prefix + self.sizes.n_ubatch, n)
            self.run([(0, position) for position in range(self.n_prefix, end)], logits=False)
            self.n_prefix = end

    def ms_per_step(self, n_sequences: int) -> float:
        """Median over steps that give one token to each sequence."""
        for sequence in range(1, n_sequences):
            self.api.llama_memory_seq_cp(self.kv, 0, sequence, 0, self.n_prefix)
        for sequence in range(n_sequences):
            self.run([(sequence, self.n_prefix + i) for i in range(self.sizes.n_live)], logits=False)
        first = self.n_prefix + self.sizes.n_live
        seconds = [
            self.run([(sequence, position) for sequence in range(n_sequences)], logits=True)
            for position in range(first, first + self.sizes.n_steps)
        ]
        for sequence in range(n_sequences):
            self.api.llama_memory_seq_rm(self.kv, sequence, self.n_prefix if sequence == 0 else 0, -1)
        return 1000 * statistics.median(seconds)
