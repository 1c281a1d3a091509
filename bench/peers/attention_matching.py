"""Attention matching with the same number of keys in each head.

Fast KV Compaction via Attention Matching (arXiv 2602.16284): keep the keys with the highest attention over reference
queries, fit a bias per key so that the attention mass is kept, then fit the values so that the outputs are kept.
"""

from functools import lru_cache

import numpy as np
import torch

from attnmem_local.memory.entries import Entries, LayerMemory
from attnmem_local.memory.memory import Memory

from ..common.builder import build_model, captured, gguf_order
from ..common.cases import Case, f32_model
from ..common.scoring import kv_bytes, score

N_QUERIES = 8192  # per KV head, drawn from the build text
RIDGE = 1e-3  # times the mean of the Gram diagonal: pulls values to the original ones; chosen by error on held-back build text
NNLS_STEPS = 300
MAX_BIAS = 10.0


def attention_matching(case: Case, share: float) -> dict:
    memory = matching_memory(case, share)
    path = case.folder / "attention-matching.mem.gguf"
    memory.save(path)
    result = score(case, f32_model(), memory=path) | {"share": memory.nbytes() / memory.kv_bytes()}
    path.unlink()
    return result


def matching_memory(case, share: float) -> Memory:
    """case: anything with a prefix and build_windows."""
    spec, prefix = build_model().spec, case.prefix
    kv, layers_seen = _captured(case)
    per_key = 2 * spec.key_length + 2 * spec.value_length + 4
    n = int(share * kv_bytes(len(prefix.tokens)) / (spec.block_count * spec.head_count_kv) / per_key)
    layers = {}
    for il, (q, o, lse) in enumerate(layers_seen):
        heads = [fit_head(*head, spec.scale, n) for head in zip(q, o, lse, kv.k[il], kv.v[il])]
        key, bias, value = (np.concatenate(parts) for parts in zip(*heads))
        offset = np.arange(spec.head_count_kv + 1, dtype=np.int32) * n
        layers[il] = LayerMemory(anchor=Entries(gguf_order(torch.from_numpy(key)), bias, value, offset))
    return Memory(spec, prefix.tokens, prefix.text, [layers], prefix.offset, prefix.messages)


@lru_cache(maxsize=1)
def _captured(case):
    """Keys and values of the prefix; per layer q [n_head_kv, n, d_k], o [n_head_kv, n, d_v], lse [n_head_kv, n]."""
    kv, layers = captured(case.prefix, case.build_windows)
    n = layers[0].q.shape[1]
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:N_QUERIES]
    return kv, [(layer.q[:, drawn], layer.o[:, drawn], layer.lse[:, drawn]) for layer in layers]


def fit_head(q, o, lse, k, v, scale: float, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys float16 [n, d_k], biases float32 [n] and values float16 [n, d_v] of one KV head.

    q [n_q, d_k], o [n_q, d_v] and lse [n_q]: reference queries and their attention states over all keys k [P, d_k]
    and values v [P, d_v].
    """
    attention = torch.exp(scale * q @ k.T - lse[:, None])
    kept = attention.square().mean(0).topk(n).indices.sort().values
    key = k[kept].half()
    a = torch.exp(scale * q @ key.float().T - lse[:, None]).double().numpy()  # mass of a kept key; that of all keys is 1
    weight = nonnegative_least_squares(a)
    x = a * weight
    x /= x.sum(1, keepdims=True)
    value = fit_values(x, o.double().numpy(), v[kept].double().numpy())
    return key.numpy(), np.log(weight).astype(np.float32), value.astype(np.float16)


def nonnegative_least_squares(a: np.ndarray) -> np.ndarray:
    """w >= 0 [n] with a·w ≈ 1 for a >= 0 [n_q, n], by multiplicative updates (Lee and Seung)."""
    gram, target = a.T @ a, a.sum(0)
    weight = np.ones(a.shape[1])
    for _ in range(NNLS_STEPS):
        weight *= target / np.maximum(gram @ weight, 1e-300)
        weight = weight.clip(np.exp(-MAX_BIAS), np.exp(MAX_BIAS))
    return weight


def fit_values(x: np.ndarray, o: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Values [n, d_v] with x·values ≈ o, for attention x [n_q, n] and outputs o [n_q, d_v], near the values v."""
    gram = x.T @ x
    ridge = RIDGE * np.trace(gram) / len(gram)
    gram[np.diag_indices_from(gram)] += ridge
    return v + np.linalg.solve(gram, x.T @ (o - x @ v))
