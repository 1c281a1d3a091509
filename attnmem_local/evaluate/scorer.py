"""Next-token distributions over live text after a fixed context, in the llama.cpp runtime."""

import os
import time
from collections.abc import Iterator, Sequence

import numpy as np

from ..runtime.llama import MemoryLlama


class Scorer:
    """Log-probabilities over live text after a fixed context: a prefix, memories, both or none.

    model: a GGUF file, or another Scorer, whose weights are shared and whose options are the defaults.
    prefix: tokens that are evaluated in the context. n_live: room in the context for live tokens. memory, options: see MemoryLlama.
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
        """Log-probabilities, float64 [n_tokens, n_vocab]: row i is the distribution of the token after tokens[i]."""
        return log_softmax(self.logits(tokens))

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits, float32 [n_tokens, n_vocab], each row after the token of the same index."""
        llama = self.llama
        llama._ctx.kv_cache_seq_rm(-1, self.n_prefix, -1)
        rows = []
        for i in range(0, len(tokens), llama.n_batch):
            batch = tokens[i : i + llama.n_batch]
            llama._batch.set_batch(batch=batch, n_past=self.n_prefix + i, logits_all=True)
            llama._ctx.decode(llama._batch)
            rows.append(np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(len(batch), llama.n_vocab())).copy())
        llama.n_tokens = self.n_prefix
        return np.concatenate(rows)

    def greedy(self, tokens: list[int], n: int) -> list[int]:
        """The n tokens of greedy decoding after live text; an end-of-text token does not stop it."""
        return [token for token, _ in self.decode(tokens, n)]

    def decode(self, tokens: list[int], n: int) -> Iterator[tuple[int, float]]:
        """Greedy decoding: yields n times the next token and the seconds it took. The first time includes the live text."""
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
    """Log-probabilities over the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p‖q) in nats per row, from log-probabilities [n, n_vocab]."""
    return (np.exp(p) * (p - q)).sum(-1)


def nll(log_probs: np.ndarray, tokens: list[int]) -> np.ndarray:
    """Negative log-likelihood in nats of each token but the first, given those before it: [n_tokens - 1]."""
    return -log_probs[np.arange(len(tokens) - 1), tokens[1:]]
