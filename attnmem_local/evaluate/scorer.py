"""Distributions of live text after a fixed context, in the llama.cpp runtime."""

import os
import time
from collections.abc import Iterator, Sequence

import numpy as np

from ..runtime.llama import MemoryLlama


class Scorer:
    """Log-probabilities of live text after a fixed context: a prefix, memories, both or none.

    model: a GGUF file, or another Scorer, whose weights this one uses, too; it has the options of that one if not given.
    prefix: tokens that are run as such. memory, options: see MemoryLlama.
    """

    llama: MemoryLlama

    def __init__(self, model: "str | os.PathLike | Scorer", prefix: Sequence[int] = (), n_live: int = 512, memory=(), **options):
        self.n_prefix = len(prefix)
        n_ctx = self.n_prefix + n_live
        if isinstance(model, Scorer):
            self.llama = model.llama.new_context(memory=memory, n_ctx=n_ctx, **options)
        else:
            self.llama = MemoryLlama(str(model), memory=memory, n_ctx=n_ctx, verbose=False, **options)
        self.llama.eval(prefix)

    def log_probs(self, tokens: list[int]) -> np.ndarray:
        """float64 [n_tokens, n_vocab]: row i is the distribution of the token after tokens[i]."""
        return log_softmax(self.logits(tokens))

    def logits(self, tokens: list[int]) -> np.ndarray:
        """float32 [n_tokens, n_vocab]."""
        llama = self.llama
        llama._ctx.kv_cache_seq_rm(-1, self.n_prefix, -1)
        rows = []
        for i in range(0, len(tokens), llama.n_batch):
            part = tokens[i : i + llama.n_batch]
            llama._batch.set_batch(batch=part, n_past=self.n_prefix + i, logits_all=True)
            llama._ctx.decode(llama._batch)
            rows.append(np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(len(part), llama.n_vocab())).copy())
        llama.n_tokens = self.n_prefix
        return np.concatenate(rows)

    def greedy(self, tokens: list[int], n: int) -> list[int]:
        """The n most likely tokens after live text, end of text or not."""
        return [token for token, _ in self.decode(tokens, n)]

    def decode(self, tokens: list[int], n: int) -> Iterator[tuple[int, float]]:
        """Yields n times the most likely next token and the seconds it took; the first includes the live text."""
        llama = self.llama
        start = time.perf_counter()
        token = int(self.logits(tokens)[-1].argmax())
        for i in range(n):
            yield token, time.perf_counter() - start
            start = time.perf_counter()
            llama._batch.set_batch(batch=[token], n_past=self.n_prefix + len(tokens) + i, logits_all=True)
            llama._ctx.decode(llama._batch)
            token = int(np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).argmax())

    def close(self) -> None:
        self.llama.close()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p‖q) per row, from log-probabilities."""
    return (np.exp(p) * (p - q)).sum(-1)


def nll(log_probs: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Of each token but the first, given those before it."""
    return -log_probs[np.arange(len(tokens) - 1), tokens[1:]]
