"""One build: what its steps share."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..memory.entries import LayerMemory
from ..memory.prefix import Prefix
from .capture import PrefixKV
from .model import BuildModel
from .progress import Progress

if TYPE_CHECKING:
    from .sources import Source

LONG = 2048  # tokens from which on a prefix gets all the work that a build can do for it


@dataclass
class LiveText:
    """Windows of live text: token sequences that each follow the prefix on their own."""

    windows: list[list[int]] = field(default_factory=list)  # to fit the memory to
    held_out: list[list[int]] = field(default_factory=list)  # to measure it on


@dataclass
class Build:
    """What all steps of a build read. Some fields are empty until the step that makes them."""

    model: BuildModel
    prefix: Prefix
    seed: int = 0
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))
    study_windows: int | None = None  # that self-study writes; by default as many as the prefix is worth
    kept: dict[int, dict[int, LayerMemory]] = field(default_factory=dict)  # layers of segments that an update does not fit
    sources: list["Source"] = field(default_factory=list)
    kv: PrefixKV = field(default_factory=PrefixKV)
    text: LiveText = field(default_factory=LiveText)  # of all sources
    traces: LiveText = field(default_factory=LiveText)  # of the real ones among them
    left_kl: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # that the fit leaves, float [n_layer, n_head_kv]
    sensitivity: torch.Tensor | None = None  # float32 [n_layer, n_head_kv, d_v, d_v], see sensitivity.py

    @property
    def segments(self) -> list[int]:
        """The numbers of the segments to fit."""
        return [s for s in range(len(self.prefix.offset) - 1) if s not in self.kept]

    def segment_tokens(self) -> list[int]:
        """The number of tokens of each segment to fit."""
        return [self.prefix.offset[s + 1] - self.prefix.offset[s] for s in self.segments]

    @property
    def n_group(self) -> int:
        """Query heads per KV head."""
        return self.model.spec.head_count // self.model.spec.head_count_kv


def effort(n_tokens: int, least: float) -> float:
    """The share of all work that a prefix of n_tokens is worth, but not less than `least`."""
    return min(1.0, max(least, n_tokens / LONG))
