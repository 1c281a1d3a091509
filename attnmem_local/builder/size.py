"""How large a memory becomes."""

from dataclasses import dataclass

import numpy as np

from ..memory.errors import BadInput
from .budget import Plan, check_bytes, head_bytes, plan_for_bytes, tune_steps, uniform_plan
from .entries.head import fits_eight_bit
from .job import Build

TABLES = ("centroid", "tangent")  # kinds of entries that can stand for a prefix without anchors
SHARE = 1 / 8  # default size of the anchors, as a fraction of the prefix's F16 KV cache
READ = 1 / 20  # upper bound on it, as a fraction of the weights at 4.5 bits each


@dataclass(slots=True)
class Size:
    """The size of a memory, as build_memory takes it. Raises BadInput for numbers that do not go together."""

    share: float | None = None
    nbytes: int | None = None
    anchors: int | None = None
    entries: int | None = None
    table: str | None = None

    def __post_init__(self):
        if self.share is not None and self.nbytes is not None:
            raise BadInput("give the size of the anchors either as a share or in bytes, not both")
        if not all(size is None or size > 0 for size in (self.share, self.nbytes)):
            raise BadInput("the size of a memory must be more than 0; give a larger --share or --bytes")
        if any(n is not None and n < 0 for n in (self.anchors, self.entries)):
            raise BadInput("the numbers of anchors and entries cannot be negative; give 0 or more")
        if self.anchors is not None and (self.share is not None or self.nbytes is not None):
            raise BadInput("give either a number of anchors per KV head (--anchors) or a size for all of them (--share, --bytes)")
        if self.anchors == 0 and not self.entries:
            raise BadInput("a memory without anchors and entries would be empty; add --entries, or give more --anchors")
        if self.table is not None and self.anchors != 0:
            raise BadInput("over anchors a table corrects them; choose its kind (--table) only without anchors (--anchors 0)")
        if self.table not in (None, *TABLES):
            raise BadInput(f"there is no table of '{self.table}'; choose one of {', '.join(TABLES)}")

    @property
    def is_default(self) -> bool:
        return self == Size()

    def anchor_bytes(self, build: Build) -> int:
        """Bytes of the anchors of the segments to fit."""
        if self.nbytes is not None:
            return self.nbytes
        if self.anchors is not None:
            return self._uniform_bytes(build, 0)
        kv_bytes = len(build.prefix.tokens) * build.model.spec.kv_bytes_per_token()
        return int(self.share * kv_bytes) if self.share is not None else default_bytes(kv_bytes, build.model.n_parameters())

    def total_bytes(self, build: Build) -> int:
        """Bytes of anchors and entries."""
        if self.anchors is not None:
            return self._uniform_bytes(build, self.entries or 0)
        return self.anchor_bytes(build) + entry_bytes(build, self.entries or 0)

    def _uniform_bytes(self, build: Build, entries: int) -> int:
        spec = build.model.spec
        n, eight_bit, table = self.anchors or 0, fits_eight_bit(spec), self.table or TABLES[0]
        heads = spec.block_count * spec.head_count_kv
        return heads * sum(head_bytes(spec, n, n_tokens, eight_bit, entries, table) for n_tokens in build.segment_tokens())

    def check(self, build: Build) -> None:
        """Raises BadInput if prefix and live text do not allow this size."""
        if self.anchors is None:
            check_bytes(build, self.anchor_bytes(build))
        n_queries = build.n_group * sum(source.n_tokens for source in build.sources)
        if (self.entries or 0) > n_queries:
            raise BadInput(
                f"{self.entries} entries per KV head are more than the {n_queries} queries of the live text; "
                "give fewer --entries, or more text (--queries)"
            )

    def plan(self, build: Build) -> Plan:
        """What every KV head gets."""
        entries = self.entries or 0
        if self.anchors is None:
            return plan_for_bytes(build, self.anchor_bytes(build), entries)
        spec = build.model.spec
        n_segment = len(build.prefix.offset) - 1
        return uniform_plan(
            spec,
            self.anchors,
            entries,
            n_segment,
            table=self.table or TABLES[0],
            eight_bit=fits_eight_bit(spec),
            tune_steps=tune_steps(max(build.segment_tokens())),
        )


def default_bytes(kv_bytes: int, n_parameters: int) -> int:
    """The default size of the anchors for a prefix with this F16 KV cache: a share of it, up to a fraction of the weights.

    Decoding is bound by memory bandwidth, and a token reads the weights and the anchors. READ keeps it within about 5 %.
    """
    return int(min(SHARE * kv_bytes, READ * n_parameters * 4.5 / 8))


def entry_bytes(build: Build, entries: int | np.ndarray) -> int:
    """Bytes of looked-up entries over anchors: one number for every KV head, or int64 [n_layer, n_head_kv]."""
    spec = build.model.spec
    n_per_head = np.broadcast_to(entries, (spec.block_count, spec.head_count_kv)).ravel().tolist()
    return len(build.segments) * sum(_entry_bytes(build, n) for n in n_per_head)


def _entry_bytes(build: Build, n: int) -> int:
    spec, eight_bit = build.model.spec, fits_eight_bit(build.model.spec)
    return head_bytes(spec, 1, 2, eight_bit, n) - head_bytes(spec, 1, 2, eight_bit)  # 2: more tokens than anchors
