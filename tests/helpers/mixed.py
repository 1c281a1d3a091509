"""A memory of random keys and values that holds every kind of entries, ragged over segments, layers and KV heads."""

import numpy as np
import torch

from attnmem_local.builder.search.hnsw import build_graph
from attnmem_local.builder.search.index import searchable
from attnmem_local.builder.state import exact_state
from attnmem_local.memory.entries import KINDS, Entries, LayerMemory
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.prefix import Prefix
from attnmem_local.memory.spec import ModelSpec
from attnmem_local.memory.tables import quantize_rows

TOP_K = 8
SEGMENTS = (  # entries per KV head
    {"centroid": (0, 40), "tangent": (50, 0), "residual": (30, 0), "token": (60, 3), "anchor": (5, 9)},
    {"centroid": (17, 0), "tangent": (0, 33), "residual": (0, 25), "anchor": (12, 8)},
    {"token": (0, 20), "anchor": (6, 0)},
)


def mixed_memory(spec: ModelSpec, prefix: Prefix, q8_0: bool, times: int = 1) -> Memory:
    """times: multiplies the entries of every kind but anchors."""
    rng = np.random.default_rng(0)
    layers = [
        {il: _layer(spec, counts, rng, q8_0, times) for il in range(spec.block_count) if il != s}  # segment s lacks layer s
        for s, counts in enumerate(SEGMENTS)
    ]
    offset = np.linspace(0, len(prefix.tokens), len(SEGMENTS) + 1).astype(int).tolist()
    return Memory(spec, prefix.tokens, prefix.text, layers, offset, token_top_k=TOP_K)


def random_queries(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 near a plane of six dimensions, as queries are, and exact in float16, so that rounding finds the same entries."""
    plane = np.random.default_rng(5).standard_normal((6, shape[-1]))
    q = rng.standard_normal((*shape[:-1], 6)) @ plane + 0.2 * rng.standard_normal(shape)
    return q.astype(np.float16).astype(np.float32)


def _layer(spec: ModelSpec, counts: dict, rng: np.random.Generator, q8_0: bool, times: int) -> LayerMemory:
    heads = {kind: [] for kind in counts}
    linked = {kind: [] for kind in counts}
    for h in range(spec.head_count_kv):
        n = {kind: n_heads[h] * (1 if kind == "anchor" else times) for kind, n_heads in counts.items()}
        anchor = _random(rng, n["anchor"], spec.key_length), _random(rng, n["anchor"], spec.value_length)
        for kind in counts:
            if kind in ("anchor", "token"):
                k, v = (
                    anchor
                    if kind == "anchor"
                    else (_random(rng, n[kind], spec.key_length), _random(rng, n[kind], spec.value_length))
                )
                entry, link = (k, 0.5 * _random(rng, len(k)), v, None), k
            else:
                entry, link = _lookup(spec, kind, random_queries(rng, n[kind], spec.key_length), anchor, rng)
            heads[kind].append(entry)
            linked[kind].append(link)
    entries = {kind: _join(parts, q8_0) for kind, parts in heads.items()}
    for kind in KINDS:
        if kind.name == "token" and kind.name in entries:
            entries["token"].graph = build_graph(linked["token"], seed=0, space="ip")
        elif kind.is_searched and kind.name in entries:
            entries[kind.name] = searchable(entries[kind.name], linked[kind.name], seed=0)
    return LayerMemory(**entries)


def _lookup(spec: ModelSpec, kind: str, c: np.ndarray, anchor: tuple, rng: np.random.Generator) -> tuple:
    """Entries at the queries c, for the state over some random tokens."""
    k, v = _random(rng, 64, spec.key_length), _random(rng, 64, spec.value_length)
    o, lse = _state(c, k, v, spec.scale)
    if kind == "tangent":  # the gradient of the log-sum-exp is the scaled mean key
        key = spec.scale * _state(c, k, k, spec.scale)[0]
        return (key, lse - (key * c).sum(-1), o, None), c
    if kind == "residual" and len(c):
        o_anchor, lse_anchor = _state(c, *anchor, spec.scale)
        o, lse = o - o_anchor, lse - lse_anchor
    return (c, -np.square(c).sum(-1) / 2, o, lse), c


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _state(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> list[np.ndarray]:
    return [x.numpy() for x in exact_state(*map(torch.from_numpy, (q, k, v)), scale)]


def _join(heads: list[tuple], q8_0: bool) -> Entries:
    key, bias, value, lse = ([head[i] for head in heads] for i in range(4))
    table = (lambda x: quantize_rows(np.concatenate(x))) if q8_0 else (lambda x: np.concatenate(x).astype(np.float16))
    return Entries(
        key=table(key),
        bias=np.concatenate(bias),
        value=table(value),
        offset=np.cumsum([0, *map(len, key)], dtype=np.int32),
        lse=None if lse[0] is None else np.concatenate(lse),
    )
