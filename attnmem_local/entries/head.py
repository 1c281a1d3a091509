"""The entries of one KV head, as a fit returns them."""

from dataclasses import dataclass

import numpy as np
import torch

from ..memory import Entries


@dataclass
class HeadEntries:
    """Entries of one kind for one KV head, in the order of transformers."""

    key: torch.Tensor  # [n, d_k] float32, already rounded to the type it is stored in
    bias: torch.Tensor  # [n] float32
    value: torch.Tensor  # [n, d_v] float32
    lse: torch.Tensor | None = None  # [n] float32


def round_to_half(x: torch.Tensor) -> torch.Tensor:
    """float32 values as float16 stores them. Raises OverflowError where float16 cannot."""
    rounded = x.half().float()
    if not rounded.isfinite().all():
        raise OverflowError(f"a value of {x.abs().max().item():.3g} does not fit into float16")
    return rounded


def join_heads(heads: list[HeadEntries], to_gguf_order) -> Entries:
    """The heads of a layer as the arrays of the file: float16 keys and values, float32 bias and log-sum-exp."""

    def numpy(tensors, dtype):
        return torch.cat(tensors).cpu().numpy().astype(dtype)

    return Entries(
        key=numpy([to_gguf_order(h.key) for h in heads], np.float16),
        bias=numpy([h.bias for h in heads], np.float32),
        value=numpy([round_to_half(h.value) for h in heads], np.float16),
        lse=None if heads[0].lse is None else numpy([h.lse for h in heads], np.float32),
        offset=np.cumsum([0, *(len(h.key) for h in heads)], dtype=np.int32),
    )
