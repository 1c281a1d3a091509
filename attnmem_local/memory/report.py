"""What a memory says about itself: a summary for programs, and whether it is a good stand-in for its prefix."""

import math
from dataclasses import asdict

from .entries import KINDS
from .memory import Memory

POOR = 1 / 4  # of the KL without the prefix: a memory that leaves more of it is worth a warning


def summary(memory: Memory) -> dict:
    """Values for JSON."""
    return {
        "model": asdict(memory.model),
        "prefix_tokens": len(memory.prefix_tokens),
        "prefix_text": memory.prefix_text,
        "prefix_is_chat": memory.prefix_messages is not None,
        "segments": len(memory.layers),
        "entries": {kind.name: int(memory.n_entries(kind.name).sum()) for kind in KINDS},
        "bytes": memory.nbytes(),
        "kv_bytes": memory.kv_bytes(),
        "build": _json_values(memory.build),
        "fidelity": _json_values(memory.fidelity),
    }


def warning(fidelity: dict[str, float]) -> str | None:
    """Why a memory may be a poor stand-in for its prefix, and what to do; None if it is a good one. fidelity: as in Memory."""
    if not fidelity:
        return "this memory was not measured when it was built: there was too little live text to hold some out"
    left, none = fidelity["kl_mean"], fidelity["kl_none"]
    if left <= POOR * none:
        return None
    deviation = f"{left / none:.0%} as much as with no prefix at all" if none > 0 else "more than with no prefix at all"
    return (
        f"this memory is a poor stand-in for its prefix: answers still deviate {deviation}. "
        "Give it more bytes (--share), or traces of real questions (--queries)"
    )


def _json_values(values: dict) -> dict:
    """The same values, with null for a number that is not finite, as JSON has none."""
    return {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in values.items()}
