"""Change parts of a prefix: only their segments of the memory are built again."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ..memory.entries import KINDS, LayerMemory
from ..memory.errors import BadInput, WrongModel
from ..memory.memory import Memory, prefix_fields
from ..memory.prefix import Prefix
from ..memory.tables import quantize_rows, rows
from ..memory.writer import tensors
from ..prompt.prefix import read_prefix
from .budget import Plan, check_bytes, plan_for_bytes, tune_steps
from .build import announce, collect_text, measure, open_sources
from .capture import prefill
from .entries.head import fits_eight_bit
from .fit import fit_memory
from .inputs import check_inputs
from .job import Build
from .model import BuildModel, load_model
from .progress import Progress
from .sources import DEFAULT_SOURCES, Query

ATTENDED = ("anchor", "token")  # kinds that a budget of bytes is spent on


def update_memory(
    memory: str | os.PathLike | Memory,
    model: str | os.PathLike | BuildModel,
    prefix: Sequence[str | os.PathLike] | Prefix,
    out: str | os.PathLike | None = None,
    *,
    queries: Sequence[Query] = DEFAULT_SOURCES,
    tools: list[dict] | None = None,
    windows: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Memory:
    """The memory of a changed prefix, made from that of the old one.

    prefix: all parts, changed or not. Segments whose tokens are unchanged keep their entries. If they stand at another
    distance from the live text now, their keys are rotated by the difference, which is exact. A kept segment still reflects
    the old text before it: its keys and values were computed in that context. This is the only loss against a full rebuild.
    Changed segments get anchors at the old memory's bytes per token, and as many looked-up entries as it has.
    tools: of the chat.  [default: those of the old memory, which also keeps its date]
    windows: of self-study.  [default: see study_shape, for the tokens that changed]
    Raises WrongModel if the memory is of another model, BadInput if nothing changed.
    """
    progress = progress or Progress(quiet=True)
    check_inputs(model, prefix, queries, out)
    with progress.stage("load model"):
        old = memory if isinstance(memory, Memory) else Memory.load(memory)
        model = model if isinstance(model, BuildModel) else load_model(model, device)
        if old.model != model.spec:
            raise WrongModel("the memory was built for another model; give that model, or build a new memory")
        if not old.prefix_tokens:
            raise BadInput("the memory stands for an empty prefix; build a new memory")
        if not isinstance(prefix, Prefix):
            is_chat = old.prefix_messages is not None
            prefix = read_prefix(
                model.tokenizer, [Path(path) for path in prefix], is_chat, tools or old.prefix_tools, old.prefix_date
            )
        same = unchanged(old, prefix)
        if len(same) == len(old.layers) == len(prefix.offset) - 1:
            raise BadInput("no part of the prefix has changed; the memory is up to date")
        build = Build(model, prefix, seed, progress, windows, kept=_kept(model, old, prefix, same))
        open_sources(build, queries)
        nbytes = attended_bytes(old) * sum(build.segment_tokens()) // len(old.prefix_tokens)
        entries, table = looked_up(old)
        if nbytes:
            check_bytes(build, nbytes)
    announce(build, nbytes, entries.mean(), nbytes > 0)

    with progress.stage("prefill", len(prefix.tokens)) as step:
        build.kv = prefill(model, prefix.tokens, progress=step)
    collect_text(build)
    if build.segments and nbytes:
        result = fit_memory(build, plan_for_bytes(build, nbytes, entries))
    elif build.segments:
        result = fit_memory(build, _without_anchors(build, entries, table))
    else:  # parts were only left out
        result = replace(
            old,
            **prefix_fields(prefix),
            layers=[build.kept[s] for s in range(len(build.kept))],
            fidelity={},
        )
    measure(build, result)
    if out is not None:
        with progress.stage("write"):
            result.save(out)
    return result


def unchanged(old: Memory, prefix: Prefix) -> dict[int, int]:
    """The segments of a prefix that an old memory has, in the same order: number in the prefix -> number in the memory."""

    def parts(tokens, offset):
        return [tuple(tokens[a:b]) for a, b in pairwise(offset)]

    matcher = difflib.SequenceMatcher(
        None, parts(old.prefix_tokens, old.segment_offset), parts(prefix.tokens, prefix.offset), autojunk=False
    )
    return {block.b + i: block.a + i for block in matcher.get_matching_blocks() for i in range(block.size)}


def attended_bytes(memory: Memory) -> int:
    """Bytes of anchors and exact tokens, which a budget is spent on."""
    return sum(array.nbytes for name, array in tensors(memory) if name.split(".")[-2] in ATTENDED)


def looked_up(memory: Memory) -> tuple[np.ndarray, str]:
    """Looked-up entries per layer and KV head, int64 [n_layer, n_head_kv], and the kind of those without anchors."""
    n = {kind.name: memory.n_entries(kind.name).max(0) for kind in KINDS if kind.name not in ATTENDED}
    return np.max(list(n.values()), axis=0), "tangent" if n["tangent"].any() else "centroid"


def _without_anchors(build: Build, entries: np.ndarray, table: str) -> Plan:
    shape = len(build.prefix.offset) - 1, *entries.shape
    steps = tune_steps(max(build.segment_tokens()))
    name = f"{entries.max()} entries per KV head"
    return Plan(np.zeros(shape, np.int64), np.broadcast_to(entries, shape), name, table, fits_eight_bit(build.model.spec), steps)


def _kept(model: BuildModel, old: Memory, prefix: Prefix, same: dict[int, int]) -> dict[int, dict[int, LayerMemory]]:
    """The layers of unchanged segments, at their new positions."""
    kept = {}
    for s, before in same.items():
        delta = (prefix.offset[s] - len(prefix.tokens)) - (old.segment_offset[before] - len(old.prefix_tokens))
        kept[s] = {il: _moved(model, layer, delta) for il, layer in old.layers[before].items()}
    return kept


def _moved(model: BuildModel, layer: LayerMemory, delta: int) -> LayerMemory:
    """The entries of tokens that now stand `delta` positions further on.

    An entry serves a query at the same distance from its tokens as before, so all keys rotate like those of the tokens. That
    includes the keys of centroids, which are queries, and the means of their lists. Distances between keys, and so the
    graphs, stay as they are.
    """
    if delta == 0:
        return layer
    moved = LayerMemory()
    for kind in KINDS:
        if (entries := getattr(layer, kind.name)) is not None:
            lists = entries.lists and replace(entries.lists, key=_rotated(model, entries.lists.key, delta))
            setattr(moved, kind.name, replace(entries, key=_rotated(model, entries.key, delta), lists=lists))
    return moved


def _rotated(model: BuildModel, table: np.ndarray, delta: int) -> np.ndarray:
    key = model.from_gguf_order(torch.from_numpy(rows(table)))
    rotated = model.to_gguf_order(model.rotate(key, delta)).numpy()
    return quantize_rows(rotated) if table.dtype == np.uint8 else rotated.astype(table.dtype)
