"""How well memories stand in for their prefix, measured in the llama.cpp runtime.

KL is KL(full prefix‖other) per position of the live text, NLL is that of the live text itself per token; both in nats.
"""

import os

import numpy as np

from .scorer import Scorer, kl, nll


def fidelity(model_path: str | os.PathLike, memory, windows: list[list[int]], **options) -> dict[str, float]:
    """Compare memories, the full prefix and no prefix on held-out live text.

    memory: one or several, see MemoryLlama; the full prefix is that of the first. windows: token sequences, each of which follows
    the prefix directly. options: see MemoryLlama.
    Returns kl_mean and kl_median of the memory, top1 (fraction of positions at which full prefix and memory have the same most
    likely token), nll_full, nll_memory and nll_none.
    """
    n_live = max(map(len, windows))
    attached = Scorer(model_path, memory=memory, n_live=n_live, **options)
    prefix = attached.llama.memories[0].memory.prefix_tokens
    runs = {
        "full": Scorer(attached, prefix, n_live=n_live),
        "memory": attached,
        "none": Scorer(attached, n_live=n_live),
    }
    losses: dict[str, list[np.ndarray]] = {name: [] for name in runs}
    divergences, agreements = [], []
    for window in windows:
        log_probs = {}
        for name, run in runs.items():
            log_probs[name] = run.log_probs(window)
            losses[name].append(nll(log_probs[name], window))
        divergences.append(kl(log_probs["full"], log_probs["memory"]))
        agreements.append(log_probs["full"].argmax(-1) == log_probs["memory"].argmax(-1))
    for run in runs.values():
        run.close()
    divergence = np.concatenate(divergences)
    return {
        "kl_mean": float(divergence.mean()),
        "kl_median": float(np.median(divergence)),
        "top1": float(np.concatenate(agreements).mean()),
        **{f"nll_{name}": float(np.concatenate(values).mean()) for name, values in losses.items()},
    }
