"""How well memories stand in for their prefix, measured in the llama.cpp runtime.

KL is of the full-prefix distribution to the other one, in nats, per position of the live text. NLL is of the true
text, in nats per token.
"""

import os

import numpy as np

from .scorer import Scorer, kl, nll


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
