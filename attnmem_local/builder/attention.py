"""The attention that replaces that of the transformers model: it merges live tokens with the state of what lies before them.

A session gives that state. Sessions differ in where it comes from, see capture.py.
"""

from typing import Protocol

import torch
import transformers

from .state import State, causal_state, merge

ATTENTION_NAME = "attnmem"


class Session(Protocol):
    def past(self, layer: int, q: torch.Tensor, scale: float, live: State) -> State | None:
        """The state of what lies before the live tokens, for queries q [batch, n_head_kv, g·n_tokens, d_k].

        live: the state of the queries over the live tokens, shaped like the result.
        """

    def live(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All live keys and values. k, v: those of the tokens just run, [batch, n_head_kv, n_tokens, d]."""

    hidden: torch.Tensor | None  # bool [batch, 1, 1, n_tokens, n], true where a live token is masked; None: causal


def _attention(module, query, key, value, attention_mask, scaling, session: Session, **_):
    batch, n_head, n_tokens, d_k = query.shape
    n_head_kv = key.shape[1]
    q = query.float().reshape(batch, n_head_kv, -1, d_k)  # the query heads of a group follow each other
    k, v = session.live(module.layer_idx, key, value)
    state = causal_state(
        q.view(batch, n_head_kv, -1, n_tokens, d_k), k[:, :, None].float(), v[:, :, None].float(), scaling, _on(session.hidden, q)
    )
    state = state[0].flatten(2, 3), state[1].flatten(2, 3)
    past = session.past(module.layer_idx, q, scaling, state)
    if past is not None:
        state = merge(past, state)
    out = state[0].reshape(batch, n_head, n_tokens, -1)
    return out.transpose(1, 2).to(query.dtype), None


def _on(x: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor | None:
    """A tensor on the device of another one: layers may lie on several devices."""
    return None if x is None else x.to(other.device)


transformers.AttentionInterface.register(ATTENTION_NAME, _attention)
transformers.AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)  # _attention masks itself
