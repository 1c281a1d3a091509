"""Exactness and fidelity of a memory, measured in the llama.cpp runtime.

KL is of the full-prefix distribution to the other one, in nats, per position of the live text. NLL is of the true
text, in nats per token.
"""

import ctypes
import os
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np

from .runtime import MemoryLlama

F32 = 0  # ggml_type


class Scorer:
    """Log-probabilities of live text after a fixed context: a prefix, memories, both or none."""

    def __init__(self, model_path: str | os.PathLike, prefix: list[int] = (), n_live: int = 512, memory=(), **options):
        self.n_prefix = len(prefix)
        n_ctx = self.n_prefix + n_live
        self.llama = MemoryLlama(str(model_path), memory=memory, n_ctx=n_ctx, verbose=False, **options)
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

    def decode(self, tokens: list[int], n: int):
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


def fidelity(model_path: str | os.PathLike, memory, windows: list[list[int]], **options) -> dict[str, float]:
    """How well memories stand in for their prefix on held-out live text.

    memory: one or several paths. windows: token sequences, each of which follows the prefix on its own.
    The full-prefix run has the prefix of the first memory. options go to MemoryLlama.
    Returns kl_mean, kl_median, top1 (share of positions with the same most likely token), nll_full, nll_memory, nll_none.
    """
    n_live = max(map(len, windows))
    attached = Scorer(model_path, memory=memory, n_live=n_live, **options)
    prefix = attached.llama.memories[0].memory.prefix_tokens
    runs = {
        "full": Scorer(model_path, prefix, n_live=n_live, **options),
        "memory": attached,
        "none": Scorer(model_path, n_live=n_live, **options),
    }
    losses: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    divergence, agree = [], []
    for window in windows:
        log_probs = {}
        for name, run in runs.items():
            log_probs[name] = run.log_probs(window)
            losses[name].append(nll(log_probs[name], window))
        divergence.append(kl(log_probs["full"], log_probs["memory"]))
        agree.append(log_probs["full"].argmax(-1) == log_probs["memory"].argmax(-1))
    for run in runs.values():
        run.close()
    divergence = np.concatenate(divergence)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_median": float(np.median(divergence)),
        "top1": float(np.concatenate(agree).mean()),
        **{f"nll_{name}": float(np.concatenate(values).mean()) for name, values in losses.items()},
    }


def exactness(
    model_path: str | os.PathLike, tokens: list[int], live: list[int], *, n_greedy: int = 64, progress=None, **options
) -> dict[str, float | bool]:
    """The exact memory of a prefix (anchors = every key and value, bias 0) against the prefix itself.

    tokens: the prefix. live: text after it. The memory is built twice: from keys and values captured by the
    transformers builder, and from the KV cache of the runtime.
    options: how the memory is run, such as type_k, type_v and flash_attn of MemoryLlama. The reference is always the full
    prefix with an F16 cache, without flash attention.
    Returns kl_builder, kl_runtime and their larger one kl_mean; kl_floor, the noise of the runtime on the same text: the
    full prefix with these options (with none, with flash attention) against the reference; greedy_equal, whether both
    memories give the n_greedy tokens of the reference.
    """
    from .build import exact_memory
    from .capture import prefill
    from .model import load_model
    from .prefix import Prefix
    from .progress import Progress

    progress = progress or Progress(quiet=True)
    with progress.stage("load model"):
        model = load_model(model_path)
    prefix = Prefix(tokens, model.tokenizer.decode(tokens))
    with progress.stage("prefill", len(tokens)) as step:
        captured = {"builder": prefill(model, tokens, progress=step), "runtime": runtime_kv(model_path, model, tokens)}

    with progress.stage("score"):
        n_live = len(live) + n_greedy
        full = Scorer(model_path, tokens, n_live=n_live)
        expected, expected_tokens = full.log_probs(live), full.greedy(live, n_greedy)
        full.close()
        floor = Scorer(model_path, tokens, n_live=n_live, **(options or {"flash_attn": True}))
        result = {"kl_floor": float(kl(expected, floor.log_probs(live)).mean())}
        floor.close()
        equal = []
        with tempfile.TemporaryDirectory() as folder:
            for name, kv in captured.items():
                path = Path(folder) / f"{name}.mem.gguf"
                exact_memory(model, prefix, kv).save(path)
                run = Scorer(model_path, memory=path, n_live=n_live, **options)
                result[f"kl_{name}"] = float(kl(expected, run.log_probs(live)).mean())
                equal.append(run.greedy(live, n_greedy) == expected_tokens)
                run.close()
    return {"kl_mean": max(result["kl_builder"], result["kl_runtime"]), **result, "greedy_equal": all(equal)}


def runtime_kv(model_path: str | os.PathLike, model, tokens: list[int]):
    """Keys and values of a prefix from llama.cpp's own F32 KV cache, moved to positions −P … −1."""
    import torch

    from .capture import PrefixKV

    spec, n = model.spec, len(tokens)
    llama = MemoryLlama(str(model_path), n_ctx=n, verbose=False, type_k=F32, type_v=F32)
    llama.eval(tokens)
    size = llama_cpp.llama_state_seq_get_size(llama.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    llama_cpp.llama_state_seq_get_data(llama.ctx, buffer, size, 0)
    llama.close()

    # llama_kv_cache::state_write: all keys as [cell, head, d], then all values transposed to [head, d, cell]
    data = memoryview(buffer).cast("B")
    header = 4 + 4 + 4 + 4 + n * (4 + 4 + 4) + 4 + 4  # magic, sequence, streams, cells, positions, v_trans, layers
    kv, at = PrefixKV(), header
    for il in range(spec.block_count):
        at += 4 + 8  # type, row size
        k = np.frombuffer(data, np.float32, n * spec.head_count_kv * spec.key_length, at)
        at += k.nbytes
        k = torch.from_numpy(k.reshape(n, spec.head_count_kv, spec.key_length).swapaxes(0, 1).copy())
        kv.k.append(model.rotate(model.from_gguf_order(k), -n).to(model.device_of(il)))
    for il in range(spec.block_count):
        at += 4 + 4 + 4  # type, element size, rows
        v = np.frombuffer(data, np.float32, n * spec.head_count_kv * spec.value_length, at)
        at += v.nbytes
        v = v.reshape(spec.head_count_kv, spec.value_length, n).swapaxes(1, 2)
        kv.v.append(torch.from_numpy(v.copy()).to(model.device_of(il)))
    assert at == size, "the layout of llama_kv_cache::state_write has changed"
    return kv
