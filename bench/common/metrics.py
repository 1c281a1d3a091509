"""How far a distribution is from that of the full prefix. Needs numpy only: environments of peers import it, too."""

import numpy as np


def compare(full: list[np.ndarray], other: list[np.ndarray], texts: list[list[int]]) -> dict[str, float | list[float]]:
    """KL to the full-prefix run in nats per position, NLL of the text in nats per token, and agreement of the top token.

    full, other: log-probabilities [n_positions, n_vocab] of each window. texts: the token at each of these positions, which
    is followed by what is predicted there; the last position has no true next token and counts for KL and agreement only.
    Returns kl, nll, top1 (share of positions with the same most likely token), and kl_windows, the KL of each window.
    """
    divergence, loss, agree = [], [], []
    for p, q, text in zip(full, other, texts, strict=True):
        p, q = p.astype(np.float64), q.astype(np.float64)
        divergence.append((np.exp(p) * (p - q)).sum(-1))
        loss.append(-q[np.arange(len(text) - 1), text[1:]])
        agree.append(p.argmax(-1) == q.argmax(-1))
    return {
        "kl": float(np.concatenate(divergence).mean()),
        "nll": float(np.concatenate(loss).mean()),
        "top1": float(np.concatenate(agree).mean()),
        "kl_windows": [float(x.mean()) for x in divergence],
    }
