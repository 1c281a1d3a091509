"""The entries of one KV head, as a fit returns them, and how the heads of a layer become the arrays of a memory."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ...memory.entries import Entries
from ...memory.errors import OutOfRange
from ...memory.spec import ModelSpec
from ...memory.tables import fits_q8_0, quantize_rows, row_bytes, rows


@dataclass
class HeadEntries:
    """Entries of one kind for one KV head. Keys and centers are in the order of transformers until they are joined."""

    key: torch.Tensor  # [n, d_k] float32, already rounded to half precision
    bias: torch.Tensor  # [n] float32
    value: torch.Tensor  # [n, d_v] float32
    lse: torch.Tensor | None = None  # [n] float32
    center: torch.Tensor | None = None  # [n, d_k] float32, the query each entry was made for; None for attended kinds

    def searched_by(self) -> torch.Tensor:
        assert self.center is not None, "only entries that are looked up have centers"
        return self.center


def no_entries(spec: ModelSpec) -> HeadEntries:
    """The entries of a head that has none of a kind."""
    key, number = torch.zeros(0, spec.key_length), torch.zeros(0)
    return HeadEntries(key, number, torch.zeros(0, spec.value_length), number, key)


def fits_eight_bit(spec: ModelSpec) -> bool:
    """Whether both keys and values can be stored as Q8_0."""
    return fits_q8_0(spec.key_length) and fits_q8_0(spec.value_length)


def pair_bytes(spec: ModelSpec, eight_bit: bool) -> int:
    """Bytes of one key and one value, in Q8_0 or float16."""
    return row_bytes(spec.key_length, eight_bit) + row_bytes(spec.value_length, eight_bit)


def round_to_half(x: torch.Tensor) -> torch.Tensor:
    """float32 values as float16 stores them. Raises OutOfRange where float16 cannot."""
    rounded = x.half().float()
    if not rounded.isfinite().all():
        raise OutOfRange(f"a value of {x.abs().max().item():.3g} does not fit into float16")
    return rounded


def join_heads(heads: list[HeadEntries], to_gguf_order: Callable, eight_bit: bool = False) -> Entries:
    """The heads of a layer as the arrays of the file: float16 or Q8_0 keys and values, float32 bias and log-sum-exp.

    Where keys that are looked up lose precision, their biases make up for it: the score at the center of an entry stays.
    Keys of tangents stay float16. Their score is the log-sum-exp, and the best of many close ones would be one rounded up.
    """

    def numpy(tensors, dtype):
        return torch.cat([t.cpu() for t in tensors]).numpy().astype(dtype)

    def table(tensors, eight_bit=eight_bit):
        if eight_bit:
            return quantize_rows(numpy(tensors, np.float32))
        return numpy([round_to_half(x) for x in tensors], np.float16)

    keys = [to_gguf_order(head.key) for head in heads]
    is_searched = all(head.center is not None for head in heads)
    lse = [head.lse for head in heads if head.lse is not None]
    has_lse = len(lse) == len(heads)
    key = table(keys, eight_bit and not (is_searched and not has_lse))
    bias = numpy([head.bias for head in heads], np.float32)
    if is_searched:
        center = numpy([to_gguf_order(head.searched_by()) for head in heads], np.float32)
        bias += ((numpy(keys, np.float32) - rows(key)) * center).sum(-1)
    return Entries(
        key=key,
        bias=bias,
        value=table([head.value for head in heads]),
        lse=numpy(lse, np.float32) if has_lse else None,
        offset=np.cumsum([0, *(len(head.key) for head in heads)], dtype=np.int32),
    )
