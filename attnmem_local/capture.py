"""Running the model with the prefix outside of its context: positions −P … −1, live tokens from 0.

The attention of the transformers model is replaced by one that asks a session for the state of what lies before the
live tokens, and merges it with causal attention over them. Sessions differ in where that state comes from.
"""

from dataclasses import dataclass, field
from typing import Callable, Protocol

import torch
import transformers

from .state import State, causal_state, exact_state, merge

ATTENTION_NAME = "attnmem"


class Session(Protocol):
    def past(self, layer: int, q: torch.Tensor, scale: float) -> State | None:
        """State of what lies before the live tokens for queries q [batch, n_head_kv, g·n_tokens, d_k]."""

    def live(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All live keys and values, given those of the tokens just run [batch, n_head_kv, n_tokens, d]."""


def _attention(module, query, key, value, attention_mask, scaling, session: Session, **_):
    batch, n_head, n_tokens, d_k = query.shape
    n_head_kv = key.shape[1]
    q = query.float().reshape(batch, n_head_kv, -1, d_k)  # the query heads of a group follow each other
    past = session.past(module.layer_idx, q, scaling)
    k, v = session.live(module.layer_idx, key, value)
    q = q.view(batch, n_head_kv, -1, n_tokens, d_k)
    state = causal_state(q, k[:, :, None].float(), v[:, :, None].float(), scaling)
    if past is not None:
        state = merge(tuple(x.reshape(state[i].shape) for i, x in enumerate(past)), state)
    out = state[0].reshape(batch, n_head, n_tokens, -1)
    return out.transpose(1, 2).to(query.dtype), None


transformers.AttentionInterface.register(ATTENTION_NAME, _attention)
transformers.AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)  # _attention masks itself


@dataclass
class PrefixKV:
    """Keys and values of a prefix after RoPE at positions −P … −1, in the order of transformers."""

    k: list[torch.Tensor] = field(default_factory=list)  # per layer [n_head_kv, P, d_k] float32
    v: list[torch.Tensor] = field(default_factory=list)  # per layer [n_head_kv, P, d_v] float32

    def state(self, layer: int, q: torch.Tensor, scale: float) -> State:
        """Exact state of q [batch, n_head_kv, n_q, d_k]."""
        batch = len(q)
        q = q.transpose(0, 1).flatten(1, 2)  # the batch shares the prefix: one matrix product per KV head
        return tuple(x.unflatten(1, (batch, -1)).transpose(0, 1) for x in exact_state(q, self.k[layer], self.v[layer], scale))


class _Prefill:
    """Runs the prefix itself, chunk by chunk, and keeps its keys and values."""

    def __init__(self, kv: PrefixKV):
        self.kv = kv

    def past(self, layer, q, scale):
        return self.kv.state(layer, q, scale) if layer < len(self.kv.k) else None

    def live(self, layer, k, v):
        if layer == len(self.kv.k):
            self.kv.k.append(k[0].float())
            self.kv.v.append(v[0].float())
        else:
            self.kv.k[layer] = torch.cat((self.kv.k[layer], k[0].float()), dim=1)
            self.kv.v[layer] = torch.cat((self.kv.v[layer], v[0].float()), dim=1)
        return k, v


class Live:
    """Runs live tokens after a prefix; with `seen` the queries of every layer and their states are handed on.

    past_state: gives the state of the prefix, e.g. PrefixKV.state
    seen(layer, q, state): q float32 [batch, n_head_kv, g·n_tokens, d_k], of one group member after the other
    """

    def __init__(self, past_state: Callable[[int, torch.Tensor, float], State] | None, seen: Callable | None = None):
        self.past_state = past_state
        self.seen = seen
        self.cache: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.n_tokens = 0

    def past(self, layer, q, scale):
        if self.past_state is None:
            return None
        state = self.past_state(layer, q, scale)
        if self.seen is not None:
            self.seen(layer, q, state)
        return state

    def live(self, layer, k, v):
        if layer in self.cache:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.cache[layer], (k, v)))
        self.cache[layer] = k, v
        return k, v

    def run(self, model, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, n_tokens, n_vocab] of the next live tokens [batch, n_tokens]."""
        logits = _forward(model, tokens, self.n_tokens, self)
        self.n_tokens += tokens.shape[1]
        return logits


def _forward(model, tokens, first_position, session, **options):
    positions = torch.arange(first_position, first_position + tokens.shape[1], device=model.device)[None]
    with torch.inference_mode():
        return model.module(
            input_ids=tokens.to(model.device), position_ids=positions, use_cache=False, session=session, **options
        ).logits


def prefill(model, tokens: list[int], chunk: int = 512, progress: Callable[[int], None] = lambda n: None) -> PrefixKV:
    """Keys and values of a prefix, computed in chunks so that memory stays bounded."""
    kv = PrefixKV()
    session = _Prefill(kv)
    for start in range(0, len(tokens), chunk):
        part = torch.tensor([tokens[start : start + chunk]])
        _forward(model, part, start - len(tokens), session, logits_to_keep=1)
        progress(part.shape[1])
    return kv


@dataclass
class Captured:
    """Live queries of one layer and their exact states over the prefix, on the CPU, in the order of transformers."""

    q: torch.Tensor  # [n_head_kv, n, d_k] float32, after RoPE
    o: torch.Tensor  # [n_head_kv, n, d_v] float32
    lse: torch.Tensor  # [n_head_kv, n] float32


def capture(
    model, kv: PrefixKV, windows: list[list[int]], batch: int = 4, progress: Callable[[int], None] = lambda n: None
) -> list[Captured]:
    """Queries of live text after the prefix, per layer.

    windows: token sequences, each run on its own from position 0; those of equal length share a batch.
    """
    by_length: dict[int, list[list[int]]] = {}
    for window in windows:
        by_length.setdefault(len(window), []).append(window)
    parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in range(model.spec.block_count)]

    def seen(layer, q, state):
        parts[layer].append(tuple(x.transpose(0, 1).flatten(1, 2).cpu() for x in (q, *state)))

    for _, group in sorted(by_length.items(), reverse=True):
        for i in range(0, len(group), batch):
            tokens = torch.tensor(group[i : i + batch])
            _forward(model, tokens, 0, Live(kv.state, seen), logits_to_keep=1)
            progress(tokens.numel())
    return [Captured(*(torch.cat(x, dim=1) for x in zip(*layer))) for layer in parts]
