"""Fitting the entries of a memory: one pass over the live text, layer by layer."""

import math
from importlib.metadata import version

import numpy as np
import torch

from ..memory.entries import Entries, LayerMemory
from ..memory.memory import Memory, prefix_fields
from .budget import Plan, head_kl
from .capture import Packed
from .entries import KINDS, counts
from .entries.head import HeadEntries, join_heads, no_entries
from .entries.kind import EntryKind, Head
from .entries.target import Target, segment_targets
from .entries.token import TOP_K
from .job import Build
from .memory_state import memory_state
from .state import State

LATER = 8  # one window in this many begins at a later position
FAR = 8192  # the latest position, in tokens


def fit_memory(build: Build, plan: Plan) -> Memory:
    """The memory of a prefix, fitted to live text.

    One pass over the text, layer by layer: each layer is fitted to the queries that it sees when the layers below already
    run on their memory, and to the exact states of the prefix for these queries.
    """
    prefix, windows = build.prefix, build.text.windows
    memory = Memory(
        model=build.model.spec,
        **prefix_fields(prefix),
        layers=[build.kept.get(s, {}) for s in range(len(prefix.offset) - 1)],
        token_top_k=TOP_K,
        build={
            "query_tokens": sum(map(len, windows)),
            "plan": plan.name,
            "seed": build.seed,
            "attnmem": version("attnmem-local"),
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
        },
    )
    if build.model.file_name is not None:
        memory.build["model"] = build.model.file_name
    if build.sources:
        memory.build["queries"] = ", ".join(source.name for source in build.sources)
    build.left_kl = np.zeros((build.model.spec.block_count, build.model.spec.head_count_kv))
    with build.progress.stage("fit", build.model.spec.block_count) as step, torch.no_grad():

        def visit(il: int, target: Target) -> State:
            targets = segment_targets(target, build.kv.k[il], build.kv.v[il], prefix.offset, build.model.spec.scale)
            for s in build.segments:
                memory.layers[s][il] = fit_layer(build, plan, s, il, targets[s])
            o, lse = memory_state(memory, il, build.model.to_gguf_order(target.q))
            if build.sensitivity is not None:
                for h, sensitivity in enumerate(build.sensitivity[il]):
                    build.left_kl[il, h] = head_kl(target.head(h), (o[h], lse[h]), sensitivity, build.n_group)
            step(1)
            return o, lse

        Packed(build.kv, windows, visit, later_positions(len(windows), build.seed)).run(build.model, logits_to_keep=1)
    return memory


def later_positions(n: int, seed: int) -> list[int]:
    """Where n windows begin: most at 0, the others up to FAR tokens into a long chat, near positions more often."""
    drawn = torch.exp(torch.rand(n, generator=torch.Generator().manual_seed(seed)) * math.log(FAR)).long().tolist()
    return [position if i % LATER == LATER - 1 else 0 for i, position in enumerate(drawn)]


def fit_layer(build: Build, plan: Plan, s: int, il: int, target: Target) -> LayerMemory:
    """The entries of layer il of segment s, for the queries of a target, and the structures that they are searched by."""
    heads = [fit_head(build, plan, s, il, h, target.head(h)) for h in range(build.model.spec.head_count_kv)]
    layer = LayerMemory()
    for kind in KINDS:
        if any(kind.name in fitted for fitted in heads):
            setattr(layer, kind.name, join(build, kind, [fitted.get(kind.name) for fitted in heads], target, plan.eight_bit))
    return layer


def fit_head(build: Build, plan: Plan, s: int, il: int, h: int, target: Target) -> dict[str, HeadEntries]:
    """The entries of one KV head of a segment, by the name of their kind."""
    head = segment_head(build, s, il, h, target, plan.tune_steps)
    n = counts(int(plan.anchors[s, il, h]), int(plan.entries[s, il, h]), len(head.k), plan.table)
    for kind in KINDS:
        if n.get(kind.name):
            head.fitted[kind.name] = kind.fit(head, n[kind.name])
    return head.fitted


def segment_head(build: Build, s: int, il: int, h: int, target: Target, tune_steps: int = 0) -> Head:
    """KV head h of layer il with the keys and values of segment s, before any entries are fitted."""
    rows = slice(build.prefix.offset[s], build.prefix.offset[s + 1])
    generator = torch.Generator().manual_seed(build.seed)
    return Head(build.kv.k[il][h, rows], build.kv.v[il][h, rows], build.model.spec.scale, target, tune_steps, generator)


def join(build: Build, kind: EntryKind, heads: list[HeadEntries | None], target: Target, eight_bit: bool) -> Entries:
    """The entries of one kind of all KV heads of a layer, None for a head without any, and their search structures."""
    parts = [head or no_entries(build.model.spec) for head in heads]
    return kind.index(join_heads(parts, build.model.to_gguf_order, eight_bit), parts, target, build)
