"""Anchors: keys and values that are attended, with logits scale·q·k + bias."""

import torch

from .head import HeadEntries, round_to_half


def exact_anchors(k: torch.Tensor, v: torch.Tensor) -> HeadEntries:
    """Every key [P, d_k] and value [P, d_v] of the prefix as an anchor with bias 0: the exact memory."""
    return HeadEntries(key=round_to_half(k), bias=k.new_zeros(len(k)), value=v)
