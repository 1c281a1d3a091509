"""The entries of one KV head, as a fit returns them."""

from dataclasses import dataclass

import numpy as np
import torch

from ...memory.entries import Entries
from ...memory.errors import OutOfRange
from ...memory.tables import quantize_rows, rows


@dataclass
class HeadEntries:
    """Entries of one kind for one KV head, in the order of transformers."""

    key: torch.Tensor  # [n, d_k] float32, already rounded to half precision
    bias: torch.Tensor  # [n] float32
    value: torch.Tensor  # [n, d_v] float32
    lse: torch.Tensor | None = None  # [n] float32
    place: torch.Tensor | None = None  # [n, d_k] float32, the queries that entries that are looked up are for


def no_entries(spec) -> HeadEntries:
    """Of a head that has none of a kind."""
    key, number = torch.zeros(0, spec.key_length), torch.zeros(0)
    return HeadEntries(key, number, torch.zeros(0, spec.value_length), number, key)


def round_to_half(x: torch.Tensor) -> torch.Tensor:
    """float32 values as float16 stores them. Raises OutOfRange where float16 cannot."""
    rounded = x.half().float()
    if not rounded.isfinite().all():
        raise OutOfRange(f"a value of {x.abs().max().item():.3g} does not fit into float16")
    return rounded


def join_heads(heads: list[HeadEntries], to_gguf_order, eight_bit: bool = False) -> Entries:
    """The heads of a layer as the arrays of the file: float16 or Q8_0 keys and values, float32 bias and log-sum-exp.

    Keys of tangents stay float16: the score is the log-sum-exp, and the best of many that are close would be one rounded up.
    Where other keys that are looked up lose precision, their biases make up for it: the score at the place of an entry stays.
    """

    def numpy(tensors, dtype):
        return torch.cat([t.cpu() for t in tensors]).numpy().astype(dtype)

    def table(tensors, eight_bit=eight_bit):
        if eight_bit:
            return quantize_rows(numpy(tensors, np.float32))
        return numpy([round_to_half(x) for x in tensors], np.float16)

    keys = [to_gguf_order(h.key) for h in heads]
    searched = all(h.place is not None for h in heads)
    key = table(keys, eight_bit and not (searched and any(h.lse is None for h in heads)))
    bias = numpy([h.bias for h in heads], np.float32)
    if searched:
        place = numpy([to_gguf_order(h.place) for h in heads], np.float32)
        bias += ((numpy(keys, np.float32) - rows(key)) * place).sum(-1)
    return Entries(
        key=key,
        bias=bias,
        value=table([h.value for h in heads]),
        lse=None if any(h.lse is None for h in heads) else numpy([h.lse for h in heads], np.float32),
        offset=np.cumsum([0, *(len(h.key) for h in heads)], dtype=np.int32),
    )
