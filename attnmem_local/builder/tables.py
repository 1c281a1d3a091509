"""Tables of residuals over finished anchors, for builds from real traces: kept if they pay on held-out traces."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch

from ..memory.entries import LayerMemory
from ..memory.memory import Memory
from .capture import Packed, spread
from .entries.head import HeadEntries, fits_eight_bit
from .entries.residual import Residual
from .entries.target import Target, segment_targets
from .fidelity import Judge
from .fit import join, later_positions, segment_head
from .job import Build
from .memory_state import head_entries, memory_state
from .state import State

ENTRIES = 1024  # entries per KV head, at most
FIT_TOKENS = 2560  # tokens of traces that tables are fitted to, at most: this bounds what an attempt costs
JUDGE_TOKENS = 1920  # tokens of held-out traces that tables are judged by, at most
QUERIES_PER_ENTRY = 4  # an entry made from fewer queries tells little about the next one
CARRIED = 0.5  # the heads that get tables carry this share of the KL that the anchors leave: the others have little to gain
PAYS = 0.8  # tables stay if they leave at most this share of the KL: builds with different seeds differ by up to 10 %
NOISE = 0.001  # nats; below this KL a difference of a fifth is noise


def add_tables(build: Build, memory: Memory) -> Memory:
    """The memory with tables if they pay on held-out traces, else the same memory. Says which it is, and why."""
    n_tokens = min(FIT_TOKENS, sum(map(len, build.traces.windows)))
    n = min(ENTRIES, build.n_group * n_tokens // QUERIES_PER_ENTRY)
    if not build.traces.held_out or n == 0:
        build.progress.say("lookup tables: left out, as there are too few traces to hold some out and judge tables by them")
        return memory
    with build.progress.stage("tables", build.model.spec.block_count) as step, torch.no_grad():
        judge = Judge(build.model, build.kv, spread(build.traces.held_out, JUDGE_TOKENS))
        before = judge.kl(memory)
        if before < NOISE:
            build.progress.say(f"lookup tables: left out, as the KL on held-out traces is {before:.4f} without them")
            return memory
        heads = heads_to_correct(build.left_kl)
        tabled = with_residuals(build, memory, heads, n, step)
        after = judge.kl(tabled)
    tables = f"tables of {n} entries in {len(heads)} KV heads"
    if after > PAYS * before:
        build.progress.say(f"{tables} do not pay: KL on held-out traces {before:.4f} without and {after:.4f} with them; left out")
        return memory
    megabytes = (tabled.nbytes() - memory.nbytes()) / 1e6
    build.progress.say(f"{tables} lower the KL on held-out traces from {before:.4f} to {after:.4f}: added, {megabytes:.1f} MB")
    tabled.build["plan"] = f"{memory.build['plan']}, and {tables}"
    return tabled


def heads_to_correct(left_kl: np.ndarray) -> set[tuple[int, int]]:
    """Layer and number of the KV heads that carry most of the KL that the anchors leave: float [n_layer, n_head_kv]."""
    order = np.argsort(-left_kl, axis=None)
    before = np.cumsum(left_kl.ravel()[order]) - left_kl.ravel()[order]
    chosen = order[(before < CARRIED * left_kl.sum()) & (left_kl.ravel()[order] > 0)]
    return {(int(i) // left_kl.shape[1], int(i) % left_kl.shape[1]) for i in chosen}


def with_residuals(build: Build, memory: Memory, heads: set[tuple[int, int]], n: int, progress: Callable[[int], None]) -> Memory:
    """The memory with n residual entries in some of its heads, fitted layer by layer to the queries of the traces."""
    kind = Residual()
    tabled = replace(memory, layers=[dict(layers) for layers in memory.layers], build=dict(memory.build), fidelity={})

    def visit(il: int, target: Target) -> State:
        tables: dict[int, list[HeadEntries | None]] = {}
        for s, h, part in _fitted_heads(build, memory, il, target):
            if (il, h) in heads:
                head = segment_head(build, s, il, h, part)
                head.fitted["anchor"] = _anchors(build, memory.layers[s][il], h, part.q.device)
                tables.setdefault(s, [None] * build.model.spec.head_count_kv)[h] = kind.fit(head, n)
        for s, parts in tables.items():
            residual = join(build, kind, parts, target, fits_eight_bit(build.model.spec))
            tabled.layers[s][il] = replace(memory.layers[s][il], residual=residual)
        progress(1)
        return memory_state(tabled, il, build.model.to_gguf_order(target.q))

    windows = spread(build.traces.windows, FIT_TOKENS)
    Packed(build.kv, windows, visit, later_positions(len(windows), build.seed)).run(build.model, logits_to_keep=1)
    return tabled


def _fitted_heads(build: Build, memory: Memory, il: int, target: Target) -> Iterator[tuple[int, int, Target]]:
    """Segment, number and target of the KV heads of a layer that have fitted anchors alone: no exact ones, no tokens."""
    offset = build.prefix.offset
    for s, part in enumerate(segment_targets(target, build.kv.k[il], build.kv.v[il], offset, build.model.spec.scale)):
        layer = memory.layers[s][il]
        for h in range(build.model.spec.head_count_kv):
            n_tokens = 0 if layer.token is None else layer.token.offset[h + 1] - layer.token.offset[h]
            n_anchors = 0 if layer.anchor is None else layer.anchor.offset[h + 1] - layer.anchor.offset[h]
            if n_tokens == 0 and 0 < n_anchors < offset[s + 1] - offset[s]:
                yield s, h, part.head(h)


def _anchors(build: Build, layer: LayerMemory, h: int, device: torch.device) -> HeadEntries:
    """The anchors of a KV head as the memory has them, in the order of transformers."""
    assert layer.anchor is not None
    anchors = head_entries(layer.anchor, h, device)
    return replace(anchors, key=build.model.from_gguf_order(anchors.key))
