"""Repeat-prefill: the prefix itself, as if the model were asked to repeat it (KVzip, arXiv 2505.23416)."""

from ...memory.prefix import Prefix


def repeat_prefill(prefix: Prefix, window: int) -> list[list[int]]:
    return [prefix.tokens[i : i + window] for i in range(0, len(prefix.tokens), window)]
