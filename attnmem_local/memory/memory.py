"""The Memory, which stands in for a prefix."""

import io
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .content import aligned, read_content
from .entries import LayerMemory
from .files import check_space, replace_file
from .parser import parse_memory
from .prefix import Prefix
from .spec import ModelSpec
from .writer import tensors, write_memory


@dataclass
class Memory:
    """An attention-state memory of one prefix."""

    model: ModelSpec
    prefix_tokens: list[int]
    prefix_text: str
    layers: list[dict[int, LayerMemory]]  # [segment][layer]
    segment_offset: list[int]  # [n_segment + 1]: segment s stands for prefix_tokens[segment_offset[s]:segment_offset[s + 1]]
    prefix_messages: list[dict] | None = None  # the chat messages that prefix_text was rendered from
    prefix_tools: list[dict] | None = None  # the tools that were rendered with them
    prefix_date: str | None = None  # ISO format, the time of rendering if prefix_text depends on it
    token_top_k: int | None = None  # number of `token` entries that a query attends; required if there are any
    build: dict[str, str | int | float] = field(default_factory=dict)  # settings of the build
    fidelity: dict[str, float] = field(default_factory=dict)  # measured by the build, with the keys FIDELITY; empty if it was not

    @property
    def prefix(self) -> Prefix:
        return Prefix(
            self.prefix_tokens, self.prefix_text, self.prefix_messages, self.segment_offset, self.prefix_tools, self.prefix_date
        )

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(array.nbytes for _, array in tensors(self))

    def kv_bytes(self) -> int:
        """Bytes of the F16 KV cache of the prefix that the memory replaces."""
        return len(self.prefix_tokens) * self.model.kv_bytes_per_token()

    def n_entries(self, kind: str) -> np.ndarray:
        """Number of entries of a kind per segment, layer and KV head: int64 [n_segment, n_layer, n_head_kv]."""
        n = np.zeros((len(self.layers), self.model.block_count, self.model.head_count_kv), dtype=np.int64)
        for s, layers in enumerate(self.layers):
            for il, layer in layers.items():
                if (entries := getattr(layer, kind)) is not None:
                    n[s, il] = np.diff(entries.offset)
        return n

    def save(self, path: str | os.PathLike) -> None:
        """Write the file; an old one stays until the new one is complete. Raises OSError."""
        check_space(path, self.nbytes())
        with replace_file(path) as part, open(part, "wb") as f:
            write_memory(self, f)

    def content(self) -> np.ndarray:
        """The bytes that save would write: uint8 [n], writable, aligned to ALIGNMENT."""
        buffer = io.BytesIO()
        write_memory(self, buffer)
        return aligned(buffer.getbuffer())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Memory":
        """Read and check a file. Raises a MemoryRefused that says what is wrong with it."""
        return cls(**parse_memory(read_content(path)))


def prefix_fields(prefix: Prefix) -> dict[str, Any]:
    """The fields of a Memory that hold its prefix; Memory.prefix is the reverse."""
    return {
        "prefix_tokens": prefix.tokens,
        "prefix_text": prefix.text,
        "prefix_messages": prefix.messages,
        "prefix_tools": prefix.tools,
        "prefix_date": prefix.date,
        "segment_offset": prefix.offset,
    }
