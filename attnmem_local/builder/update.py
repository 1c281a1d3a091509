"""Change parts of a prefix: only their segments of the memory are built again."""

import difflib
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..memory.entries import KINDS, LayerMemory
from ..memory.errors import BadInput, WrongModel
from ..memory.memory import Memory
from ..memory.prefix import Prefix
from ..memory.tables import quantize_rows, rows
from ..prompt.prefix import read_prefix
from .budget import plan_for_bytes
from .build import collect_queries, file_name, fit_memory, given_queries, measure_and_save, query_names, study_shape, tell_estimate
from .capture import prefill
from .inputs import check_inputs
from .model import BuildModel, load_model
from .progress import Progress


def update_memory(
    memory: str | os.PathLike | Memory,
    model: str | os.PathLike | BuildModel,
    prefix: Sequence[str | os.PathLike] | Prefix,
    out: str | os.PathLike | None = None,
    *,
    queries: Sequence[str | list] = ("repeat", "self-study"),
    tools: list[dict] | None = None,
    windows: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Memory:
    """The memory of a changed prefix, made from that of the old one.

    prefix: all parts, changed or not. Segments whose tokens are as they were keep their entries; if they stand at another
    distance from the live text now, the keys are rotated by the difference, which is exact. What they say about words of
    theirs that a changed part before them would explain otherwise stays as it was: that is the loss against a full build.
    tools: of the chat.  [default: those of the old memory, which also keeps its date]
    windows: of self-study.  [default: as study_shape says for the tokens that changed]
    Raises WrongModel if the memory is of another model, ValueError if nothing changed.
    """
    progress = progress or Progress(quiet=True)
    check_inputs(model, prefix, queries, out)
    model_name = file_name(model)
    with progress.stage("load model"):
        old = memory if isinstance(memory, Memory) else Memory.load(memory)
        model = model if isinstance(model, BuildModel) else load_model(model, device)
        if old.model != model.spec:
            raise WrongModel("the memory was built for another model; give that model, or build a new memory")
        if not isinstance(prefix, Prefix):
            is_chat = old.prefix_messages is not None
            prefix = read_prefix(model.tokenizer, prefix, is_chat, tools or old.prefix_tools, old.prefix_date)
        same = unchanged(old, prefix)
        changed = [s for s in range(len(prefix.offset) - 1) if s not in same]
        if not changed and len(same) == len(old.layers):
            raise BadInput("no part of the prefix has changed")
        given = given_queries(model, prefix, queries)

    n_tokens = sum(prefix.offset[s + 1] - prefix.offset[s] for s in changed)
    nbytes = int(old.nbytes() / old.kv_bytes() * n_tokens * model.spec.kv_bytes_per_token())
    study = study_shape(n_tokens, windows)
    tell_estimate(model, prefix, given, study, nbytes, changed, progress)
    with progress.stage("prefill", len(prefix.tokens)) as step:
        kv = prefill(model, prefix.tokens, progress=step)
    keep = {}
    for s, before in same.items():
        moved = (prefix.offset[s] - len(prefix.tokens)) - (old.segment_offset[before] - len(old.prefix_tokens))
        keep[s] = {il: _moved(model, layer, moved) for il, layer in old.layers[before].items()}

    build_text, held_out = collect_queries(model, prefix, kv, given, study, seed, progress)
    if not changed:  # parts were only left out
        result = replace(
            old,
            prefix_tokens=prefix.tokens,
            prefix_text=prefix.text,
            prefix_messages=prefix.messages,
            prefix_tools=prefix.tools,
            prefix_date=prefix.date,
            segment_offset=prefix.offset,
            layers=[keep[s] for s in range(len(keep))],
            fidelity={},
        )
    else:
        plan = plan_for_bytes(model, kv, build_text, nbytes, prefix.offset, changed, seed, progress)
        result = fit_memory(model, prefix, kv, build_text, plan, keep=keep, seed=seed, progress=progress)
        result.build["queries"] = query_names(queries)
    result.build = result.build | model_name
    measure_and_save(model, kv, result, held_out, out, progress)
    return result


def unchanged(old: Memory, prefix: Prefix) -> dict[int, int]:
    """Segments of a prefix that an old memory has, by their numbers there; both in the same order."""

    def parts(tokens, offset):
        return [tuple(tokens[a:b]) for a, b in zip(offset, offset[1:])]

    matcher = difflib.SequenceMatcher(
        None, parts(old.prefix_tokens, old.segment_offset), parts(prefix.tokens, prefix.offset), autojunk=False
    )
    return {block.b + i: block.a + i for block in matcher.get_matching_blocks() for i in range(block.size)}


def _moved(model: BuildModel, layer: LayerMemory, delta: int) -> LayerMemory:
    """The entries of tokens that stand `delta` positions further on.

    An entry serves a query at the same distance from its tokens as before, so all keys turn as the tokens' own: those of
    centroids, which are queries, and the means of lists of them, too. Distances between keys, and so the graphs, stay.
    """
    if delta == 0:
        return layer
    found = LayerMemory()
    for kind in KINDS:
        if (entries := getattr(layer, kind.name)) is not None:
            lists = entries.lists and replace(entries.lists, key=_rotated(model, entries.lists.key, delta))
            setattr(found, kind.name, replace(entries, key=_rotated(model, entries.key, delta), lists=lists))
    return found


def _rotated(model: BuildModel, table: np.ndarray, delta: int) -> np.ndarray:
    key = model.from_gguf_order(torch.from_numpy(rows(table)))
    key = model.to_gguf_order(model.rotate(key, delta)).numpy()
    return quantize_rows(key) if table.dtype == np.uint8 else key.astype(table.dtype)
