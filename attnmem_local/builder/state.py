"""Attention states: the mathematics of a memory, in PyTorch.

For one head, attention of a query q over a set of tokens is fully described by its state (o, lse):
    lse = log Σ_j exp(logit_j)          natural log, float32
    o   = Σ_j exp(logit_j − lse)·v_j    logit_j = scale·q·k_j + bias_j
States over disjoint tokens merge exactly (online softmax, Milakov and Gimelshein, arXiv 1805.02867).
"""

import torch

State = tuple[torch.Tensor, torch.Tensor]  # o [..., d_v], lse [...]


def merge(a: State, b: State) -> State:
    """The state over the union of two disjoint sets of tokens. Two empty states, (0, −inf), merge to the empty state."""
    (o_a, lse_a), (o_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    known = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)  # −inf − −inf would be NaN
    return o_a * (lse_a - known).exp()[..., None] + o_b * (lse_b - known).exp()[..., None], lse


def state_of_logits(logits: torch.Tensor, v: torch.Tensor) -> State:
    """The state from logits [..., n_q, n], which are overwritten, and values [..., n, d_v]."""
    top = logits.detach().amax(-1, keepdim=True)  # any number is right here, so it needs no gradient
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    p = logits.sub_(top).exp_()
    z = p.sum(-1, keepdim=True)
    o = (p @ v) / torch.where(z == 0, torch.ones_like(z), z)
    return o, (top + z.log())[..., 0]


def exact_state(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, block: int = 512) -> State:
    """The state of queries over keys and values, block by block, so that memory stays bounded for any prefix.

    q [..., n_q, d_k], k [..., n, d_k], v [..., n, d_v]; leading dimensions are equal. Computed in the type of q.
    """
    blocks = [(kb.to(q.dtype).transpose(-1, -2), vb.to(q.dtype)) for kb, vb in zip(k.split(block, dim=-2), v.split(block, dim=-2))]
    parts = []
    for part in (q * scale).split(block, dim=-2):
        state = part.new_zeros(*part.shape[:-1], v.shape[-1]), part.new_full(part.shape[:-1], -torch.inf)
        for k_block, v_block in blocks:
            state = merge(state, state_of_logits(part @ k_block, v_block))
        parts.append(state)
    return torch.cat([o for o, _ in parts], dim=-2), torch.cat([lse for _, lse in parts], dim=-1)


def causal_state(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor | None = None) -> State:
    """The state of n_q queries over n >= n_q keys. The last n_q keys belong to the same tokens as the queries.

    hidden: bool [..., n_q, n], true where a key is masked.  [default: the keys of later tokens]
    """
    n_q, n = q.shape[-2], k.shape[-2]
    if hidden is None:
        hidden = torch.ones(n_q, n, dtype=torch.bool, device=q.device).triu(n - n_q + 1)
    logits = (scale * q @ k.to(q.dtype).transpose(-1, -2)).masked_fill_(hidden, -torch.inf)
    return state_of_logits(logits, v.to(q.dtype))
