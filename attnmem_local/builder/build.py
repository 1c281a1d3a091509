"""From a prefix to a memory, top to bottom."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from ..memory.entries import KINDS, Entries, LayerMemory, reordered
from ..memory.errors import BadInput
from ..memory.files import check_space
from ..memory.memory import Memory
from ..memory.prefix import Prefix
from ..prompt.prefix import chat_prefix, read_prefix
from .budget import Plan, check_bytes, effort, plan_for_bytes
from .capture import Packed, PrefixKV, prefill
from .entries.anchor import anchor_state, exact_anchors, fit_best_anchors
from .entries.centroid import centroid_entries, cluster, mean_state
from .entries.head import HeadEntries, join_heads, no_entries
from .entries.residual import residual_entries
from .entries.tangent import tangent_entries
from .entries.target import Target, segment_targets
from .entries.token import REST, TOP_K, looked_up, rest_target
from .estimate import estimate_seconds
from .fidelity import held_out_fidelity
from .inputs import check_inputs
from .memory_state import memory_state
from .model import BuildModel, load_model
from .progress import Progress
from .search.hnsw import build_graph
from .search.lists import build_lists
from .search.token_graph import token_graph
from .sources.repeat_prefill import repeat_prefill
from .sources.self_study import self_study
from .sources.traces import read_traces, traces
from .state import exact_state

WINDOW = 384  # tokens of live text in one window
STUDY_WINDOW = 192  # of self-study about a long prefix: more and shorter windows are written faster than few long ones
STUDY_WINDOWS = 24  # about a long prefix; twice as many gained nothing in bench/queries.py
HELD_OUT = 12  # one of so many windows is not built from, but measured on
LATER = 8  # one of so many windows begins at a later position
FAR = 8192
SHARE = 1 / 8  # of the prefix's KV bytes, if nothing else is asked for, and at most
READ = 1 / 20  # of the bytes of the weights in 4.5 bits: a token reads the weights and the memory, and costs what it reads


def build_memory(
    model: str | os.PathLike | BuildModel,
    prefix: str | os.PathLike | Sequence[str | os.PathLike] | list[dict] | Prefix,
    out: str | os.PathLike | None = None,
    *,
    share: float | None = None,
    nbytes: int | None = None,
    queries: Sequence[str | list] = ("repeat", "self-study"),
    system: bool = False,
    tools: list[dict] | None = None,
    windows: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Memory:
    """Build the memory of a prefix, and write it to `out` if given.

    model: a GGUF file or a transformers directory, or a model that is already loaded.
    prefix: a file (text, or `.json` with chat messages), several files that together are the text, chat messages, or a
        Prefix. Each of several files is a segment of the memory, which update_memory can rebuild alone.
    share, nbytes: the size of the memory, as a share of the prefix's F16 KV cache or in bytes.  [default: default_bytes]
    queries: where queries come from: "repeat", "self-study", the path of a file of traces, or a list of traces.
    system: the text of the file is the system message of a chat.
    tools: tools of the chat, as OpenAI clients send them; they become part of the prefix.
    windows: how many windows of live text self-study writes.  [default: as study_shape says]
    The same inputs and seed give the same file. Raises BadInput or OSError for bad input; writes nothing then.
    """
    progress = progress or Progress(quiet=True)
    check_inputs(model, prefix, queries, out)
    model_name = file_name(model)
    if windows is not None and windows < 1:
        raise BadInput("self-study writes at least one window")
    if share is not None and nbytes is not None:
        raise BadInput("give the size of the memory either as a share or in bytes")
    if not all(size is None or size > 0 for size in (share, nbytes)):
        raise BadInput("the size of a memory is more than 0")

    with progress.stage("load model"):
        model = model if isinstance(model, BuildModel) else load_model(model, device)
        prefix = _prefix(model, prefix, system, tools)
        if not prefix.tokens:
            raise BadInput("the prefix is empty")
        if nbytes is None:
            kv_bytes = len(prefix.tokens) * model.spec.kv_bytes_per_token()
            nbytes = default_bytes(kv_bytes, model.n_parameters()) if share is None else int(share * kv_bytes)
        if out is not None:
            check_space(out, nbytes)

        given = given_queries(model, prefix, queries)

    study = study_shape(len(prefix.tokens), windows)
    segments = list(range(len(prefix.offset) - 1))
    tell_estimate(model, prefix, given, study, nbytes, segments, progress)
    with progress.stage("prefill", len(prefix.tokens)) as step:
        kv = prefill(model, prefix.tokens, progress=step)

    build_text, held_out = collect_queries(model, prefix, kv, given, study, seed, progress)
    plan = plan_for_bytes(model, kv, build_text, nbytes, prefix.offset, segments, seed, progress)
    memory = fit_memory(model, prefix, kv, build_text, plan, seed=seed, progress=progress)
    memory.build |= {"queries": query_names(queries)} | model_name
    measure_and_save(model, kv, memory, held_out, out, progress)
    return memory


def default_bytes(kv_bytes: int, n_parameters: int) -> int:
    """The size of a memory for a prefix with so many bytes of F16 KV cache: a share of them, as long as tokens stay fast."""
    return int(min(SHARE * kv_bytes, READ * n_parameters * 4.5 / 8))


def measure_and_save(
    model: BuildModel, kv: PrefixKV, memory: Memory, held_out: list[list[int]], out: str | os.PathLike | None, progress: Progress
) -> None:
    """The end of every build: fidelity on windows that were not built from, if there are any, and the file, if it is wanted."""
    if held_out:
        with progress.stage("check"):
            memory.fidelity = held_out_fidelity(model, kv, memory, held_out)
    if out is not None:
        with progress.stage("write"):
            memory.save(out)


def study_shape(n_tokens: int, windows: int | None = None) -> tuple[int, int]:
    """How many windows self-study writes about a prefix of so many tokens, and how many tokens each has.

    Windows become shorter rather than fewer: all advance together, so their length is what takes the time.
    """
    return windows or round(STUDY_WINDOWS * effort(n_tokens, 5 / 6)), round(STUDY_WINDOW * effort(n_tokens, 1 / 2))


def given_queries(model: BuildModel, prefix: Prefix, queries: Sequence[str | list]) -> list[list[list[int]] | None]:
    """Windows of live text of each source, None where self-study is still to write them."""
    found = []
    for source in queries:
        if source == "repeat":
            found.append(repeat_prefill(prefix, WINDOW))
        elif source == "self-study":
            found.append(None)
        else:
            found.append(traces(model.tokenizer, prefix, source if isinstance(source, list) else read_traces(source), WINDOW))
    if not any(windows is None or windows for windows in found):
        raise BadInput("there are no queries to build from; give traces, 'repeat' or 'self-study'")
    return found


def tell_estimate(
    model: BuildModel, prefix: Prefix, given: list, study: tuple[int, int], nbytes: int, segments: list[int], progress: Progress
) -> None:
    """Say what a build of some segments of a prefix will take, before it starts. given, study: see collect_queries.

    Raises BadInput if there are too few bytes for them.
    """
    n_written = given.count(None) * math.prod(study)
    n_live = n_written + sum(len(w) for found in given if found for w in found)
    n_tokens = [prefix.offset[s + 1] - prefix.offset[s] for s in segments]
    check_bytes(model.spec, n_tokens, nbytes)
    with progress.stage("estimate"):
        seconds = estimate_seconds(model, len(prefix.tokens), n_tokens, n_live, n_written, study[0], nbytes)
    progress.expect(n_written, seconds)


def collect_queries(
    model: BuildModel,
    prefix: Prefix,
    kv: PrefixKV,
    given: list[list[list[int]] | None],
    study: tuple[int, int],
    seed: int,
    progress: Progress,
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows of live text from all sources: those to build from, and those to measure on.

    given: see given_queries; what is None is written now. study: how many windows, and the tokens of each.
    """
    build_text, held_out = [], []
    for found in given:
        if found is None:
            with progress.stage("self-study", math.prod(study)) as step:
                found = self_study(model, prefix, kv, *study, seed, step)
        build_text += [w for i, w in enumerate(found) if i % HELD_OUT != HELD_OUT // 2]
        held_out += found[HELD_OUT // 2 :: HELD_OUT]
    return build_text, held_out


def file_name(model: str | os.PathLike | BuildModel) -> dict[str, str]:
    """The value "model" of Memory.build, by which the runtime finds the model; none for a model that has no file."""
    return {} if isinstance(model, BuildModel) else {"model": Path(model).name}


def query_names(queries: Sequence[str | list]) -> str:
    """Sources as the file names them."""
    return ", ".join(source if isinstance(source, str) else f"{len(source)} traces" for source in queries)


def fit_memory(
    model: BuildModel,
    prefix: Prefix,
    kv: PrefixKV,
    windows: list[list[int]],
    plan: Plan,
    *,
    keep: dict[int, dict[int, LayerMemory]] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Memory:
    """The memory of a prefix with keys and values kv, for live text like these windows of tokens.

    One pass over the text, layer by layer: each layer is fitted to the queries that it sees when the layers below have
    their memory already, and to the exact states of the prefix for them.
    keep: segments, by number, whose layers are there already.
    """
    progress = progress or Progress(quiet=True)
    memory = Memory(
        model=model.spec,
        prefix_tokens=prefix.tokens,
        prefix_text=prefix.text,
        prefix_messages=prefix.messages,
        prefix_tools=prefix.tools,
        prefix_date=prefix.date,
        segment_offset=prefix.offset,
        layers=[(keep or {}).get(s, {}) for s in range(len(prefix.offset) - 1)],
        token_top_k=TOP_K,
        build={
            "query_tokens": sum(map(len, windows)),
            "plan": plan.name,
            "seed": seed,
            "attnmem": version("attnmem-local"),
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
        },
    )
    with progress.stage("fit", model.spec.block_count) as step, torch.no_grad():

        def visit(il: int, target: Target):
            targets = segment_targets(target, kv.k[il], kv.v[il], prefix.offset, model.spec.scale)
            for s, own in enumerate(zip(prefix.offset, prefix.offset[1:])):
                if s not in (keep or {}):
                    k, v = (x[il][:, slice(*own)] for x in (kv.k, kv.v))
                    memory.layers[s][il] = fit_layer(model, k, v, targets[s], plan, (s, il), seed)
            step(1)
            return memory_state(memory, il, model.to_gguf_order(target.q))

        Packed(kv, windows, visit, first=later_positions(len(windows), seed)).run(model, logits_to_keep=1)
    return memory


def later_positions(n: int, seed: int) -> list[int]:
    """Where n windows begin: most at 0, some further into a long chat, up to FAR tokens, near ones more often."""
    drawn = torch.exp(torch.rand(n, generator=torch.Generator().manual_seed(seed)) * math.log(FAR)).long().tolist()
    return [at if i % LATER == LATER - 1 else 0 for i, at in enumerate(drawn)]


def fit_layer(
    model: BuildModel, k: torch.Tensor, v: torch.Tensor, target: Target, plan: Plan, at: tuple[int, int], seed: int
) -> LayerMemory:
    """The entries of one layer of a segment with keys and values [n_head_kv, n_tokens, d], and how they are searched.

    at: segment and layer.
    """
    scale = model.spec.scale
    heads = [
        fit_head(k[h], v[h], target.head(h), plan, (*at, h), scale, torch.Generator().manual_seed(seed))
        for h in range(model.spec.head_count_kv)
    ]
    layer = LayerMemory()
    for kind in KINDS:
        if any(kind.name in head for head in heads):
            parts = [head.get(kind.name) or no_entries(model.spec) for head in heads]
            entries = join_heads(parts, model.to_gguf_order, plan.eight_bit)
            if kind.name == "token":
                entries.graph = token_graph([p.key.cpu().numpy() for p in parts], list(target.q.cpu().numpy()))
            elif all(p.place is not None for p in parts):
                entries = searchable(entries, [model.to_gguf_order(p.place).cpu().numpy() for p in parts], seed)
            setattr(layer, kind.name, entries)
    return layer


def searchable(entries: Entries, places: list[np.ndarray], seed: int) -> Entries:
    """Entries with lists and a graph; places: for each head the queries [n, d_k] that its entries are for, in GGUF order."""
    lists, order = build_lists(places, seed)
    entries = reordered(entries, order)
    graph = build_graph([place[own] for place, own in zip(places, order)], seed, threads=os.cpu_count() or 1)
    return replace(entries, lists=lists, graph=graph)


def fit_head(
    k: torch.Tensor, v: torch.Tensor, target: Target, plan: Plan, at: tuple[int, int, int], scale: float, generator: torch.Generator
) -> dict[str, HeadEntries]:
    """The entries of one KV head of a segment with keys k [n_tokens, d_k] and values v [n_tokens, d_v], by kind.

    at: segment, layer and head.
    """
    n_anchors, n_entries = int(plan.anchors[at]), int(plan.entries[at])
    found = {}
    if n_anchors >= len(k) and not looked_up(len(k)):
        return {"anchor": exact_anchors(k, v)}
    if n_anchors >= len(k):
        found["token"], target, n_anchors = exact_anchors(k, v), rest_target(target, k, v, scale), REST
    if n_anchors:
        found["anchor"] = fit_best_anchors(target, k, v, n_anchors, scale, plan.tune_steps, generator)
    if n_entries:
        place, group = cluster(target.q, n_entries, plan.metric, generator)
        if n_anchors:
            found["residual"] = residual_entries(place, group, target, anchor_state(found["anchor"], target.q, scale))
        elif plan.table == "tangent":
            found["tangent"] = tangent_entries(place, mean_state(target.o, target.lse, group)[0], k, scale)
        else:
            state = exact_state(place, k, v, scale) if plan.state == "exact" else mean_state(target.o, target.lse, group)
            found["centroid"] = centroid_entries(place, state, plan.metric)
    return found


def exact_memory(model: BuildModel, prefix: Prefix, kv: PrefixKV) -> Memory:
    """Anchors = every key and value of the prefix: the memory that must equal the prefix itself."""
    layers = {
        il: LayerMemory(anchor=join_heads([exact_anchors(k, v) for k, v in zip(kv.k[il], kv.v[il])], model.to_gguf_order))
        for il in range(model.spec.block_count)
    }
    offset = [0, len(prefix.tokens)]
    return Memory(model.spec, prefix.tokens, prefix.text, [layers], offset, prefix.messages, prefix.tools, prefix.date)


def _prefix(model: BuildModel, prefix, system: bool, tools: list[dict] | None) -> Prefix:
    if isinstance(prefix, Prefix):
        return prefix
    if isinstance(prefix, (str, os.PathLike)):
        prefix = [prefix]
    if not prefix or isinstance(prefix[0], dict):
        return chat_prefix(model.tokenizer, prefix, tools=tools)
    return read_prefix(model.tokenizer, prefix, system, tools)
