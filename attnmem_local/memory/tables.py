"""Tables of keys and values: float16, float32, or Q8_0 in ggml's block layout."""

import gguf
import numpy as np

from .errors import OutOfRange

Q8_0 = gguf.GGMLQuantizationType.Q8_0
_Q8_0_BLOCK, _Q8_0_BYTES = gguf.GGML_QUANT_SIZES[Q8_0]


def rows(table: np.ndarray) -> np.ndarray:
    """A table of keys or values, decoded to float32 [n, d]."""
    if table.dtype != np.uint8:
        return table.astype(np.float32)
    blocks = np.ascontiguousarray(table).reshape(-1, _Q8_0_BYTES)
    x = block_scales(table).astype(np.float32) * blocks[:, 2:].view(np.int8)
    return x.reshape(len(table), table.shape[1] // _Q8_0_BYTES * _Q8_0_BLOCK)


def fits_q8_0(length: int) -> bool:
    """Whether rows of this many values divide into Q8_0 blocks."""
    return length % _Q8_0_BLOCK == 0


def row_bytes(length: int, q8_0: bool) -> int:
    """Bytes of a row of this many values, in Q8_0 or float16."""
    return length // _Q8_0_BLOCK * _Q8_0_BYTES if q8_0 else 2 * length


def quantize_rows(x: np.ndarray) -> np.ndarray:
    """float32 [n, d] encoded as Q8_0, uint8 [n, d / 32 * 34]. Raises OutOfRange if a block's scale does not fit into float16."""
    if not fits_q8_0(x.shape[1]):
        raise ValueError(f"rows have {x.shape[1]} values, Q8_0 needs a multiple of {_Q8_0_BLOCK}")
    table = gguf.quants.quantize(x, Q8_0)
    if not np.isfinite(block_scales(table)).all():
        raise OutOfRange(f"a value of {np.abs(x).max():.3g} does not fit into Q8_0")
    return table


def block_scales(table: np.ndarray) -> np.ndarray:
    """The scales of all blocks of a Q8_0 table: float16 [n * d / 32, 1]."""
    return np.ascontiguousarray(table.reshape(-1, _Q8_0_BYTES)[:, :2]).view(np.float16)
