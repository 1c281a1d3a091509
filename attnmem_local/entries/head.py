"""The entries of one KV head, as a fit returns them."""

from dataclasses import dataclass

import numpy as np
import torch

from ..memory import Entries, quantize_rows


@dataclass
class HeadEntries:
    """Entries of one kind for one KV head, in the order of transformers."""

    key: torch.Tensor  # [n, d_k] float32, already rounded to the type it is stored in
    bias: torch.Tensor  # [n] float32
    value: torch.Tensor  # [n, d_v] float32
    lse: torch.Tensor | None = None  # [n] float32
    place: torch.Tensor | None = None  # [n, d_k] float32, what the graph over entries that are looked up links


def no_entries(spec) -> HeadEntries:
    """Of a head that has none of a kind."""
    key, number = torch.zeros(0, spec.key_length), torch.zeros(0)
    return HeadEntries(key, number, torch.zeros(0, spec.value_length), number, key)


def round_to_half(x: torch.Tensor) -> torch.Tensor:
    """float32 values as float16 stores them. Raises OverflowError where float16 cannot."""
    rounded = x.half().float()
    if not rounded.isfinite().all():
        raise OverflowError(f"a value of {x.abs().max().item():.3g} does not fit into float16")
    return rounded


def join_heads(heads: list[HeadEntries], to_gguf_order, eight_bit: bool = False) -> Entries:
    """The heads of a layer as the arrays of the file: float16 or Q8_0 keys and values, float32 bias and log-sum-exp.

    Keys that are looked up stay float16: their biases hold the norms of just these.
    """

    def numpy(tensors, dtype):
        return torch.cat([t.cpu() for t in tensors]).numpy().astype(dtype)

    def table(tensors, eight_bit=eight_bit):
        if eight_bit:
            return quantize_rows(numpy(tensors, np.float32))
        return numpy([round_to_half(x) for x in tensors], np.float16)

    return Entries(
        key=table([to_gguf_order(h.key) for h in heads], eight_bit and any(h.place is None for h in heads)),
        bias=numpy([h.bias for h in heads], np.float32),
        value=table([h.value for h in heads]),
        lse=None if any(h.lse is None for h in heads) else numpy([h.lse for h in heads], np.float32),
        offset=np.cumsum([0, *(len(h.key) for h in heads)], dtype=np.int32),
    )
