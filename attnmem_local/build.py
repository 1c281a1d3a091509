"""From a prefix to a memory, top to bottom."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Sequence

import torch

from .capture import Captured, PrefixKV, capture, prefill
from .entries import EntryState, Metric, centroid_entries, cluster, exact_anchors, join_heads, mean_state
from .hnsw import M, build_graph
from .memory import LayerMemory, Memory, check_space, rows
from .model import BuildModel, load_model
from .prefix import Prefix, chat_prefix, read_prefix
from .progress import Progress
from .queries.repeat_prefill import repeat_prefill
from .queries.self_study import self_study
from .queries.traces import read_traces, traces
from .state import exact_state

WINDOW = 384  # tokens of live text in one window
STUDY_WINDOW = 192  # of self-study: more and shorter windows are written faster than few long ones


def build_memory(
    model: str | os.PathLike | BuildModel,
    prefix: str | os.PathLike | list[dict] | Prefix,
    out: str | os.PathLike | None = None,
    *,
    queries: Sequence[str | list] = ("repeat", "self-study"),
    entries: int = 2048,
    metric: Metric = "l2",
    state: EntryState = "mean",
    system: bool = False,
    windows: int = 24,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Memory:
    """Build the memory of a prefix, and write it to `out` if given.

    model: a GGUF file or a transformers directory, or a model that is already loaded.
    prefix: a file (text, or `.json` with chat messages), chat messages, or a Prefix.
    queries: where queries come from: "repeat", "self-study", the path of a file of traces, or a list of traces.
    entries: centroids per layer and KV head. metric, state: see entries/centroid.py.
    system: the text of the file is the system message of a chat.
    windows: how many windows of live text self-study writes.
    The same inputs and seed give the same file. Raises ValueError or OSError for bad input; writes nothing then.
    """
    progress = progress or Progress(quiet=True)
    if out is not None and not Path(out).resolve().parent.is_dir():
        raise FileNotFoundError(f"the folder of '{out}' does not exist")

    with progress.stage("load model"):
        model = model if isinstance(model, BuildModel) else load_model(model, device)
        prefix = _prefix(model, prefix, system)
        if not prefix.tokens:
            raise ValueError("the prefix is empty")
        if out is not None:
            check_space(out, model.spec.block_count * model.spec.head_count_kv * entries * _bytes_per_entry(model))

    with progress.stage("prefill", len(prefix.tokens)) as step:
        kv = prefill(model, prefix.tokens, progress=step)

    texts: list[list[int]] = []
    for source in queries:
        if source == "self-study":
            with progress.stage("self-study", windows * STUDY_WINDOW) as step:
                texts += self_study(model, prefix, kv, windows, STUDY_WINDOW, seed, step)
        elif source == "repeat":
            texts += repeat_prefill(prefix, WINDOW)
        else:
            texts += traces(model.tokenizer, prefix, source if isinstance(source, list) else read_traces(source), WINDOW)
    if not texts:
        raise ValueError("there are no queries to build from; give traces, 'repeat' or 'self-study'")

    memory = fit_memory(model, prefix, kv, texts, entries=entries, metric=metric, state=state, seed=seed, progress=progress)
    memory.build["queries"] = ", ".join(s if isinstance(s, str) else f"{len(s)} traces" for s in queries)
    if out is not None:
        with progress.stage("write"):
            memory.save(out)
    return memory


def fit_memory(
    model: BuildModel,
    prefix: Prefix,
    kv: PrefixKV,
    windows: list[list[int]],
    *,
    entries: int = 2048,
    metric: Metric = "l2",
    state: EntryState = "mean",
    seed: int = 0,
    progress: Progress | None = None,
) -> Memory:
    """The memory of a prefix with keys and values kv, for live text like these windows of tokens."""
    progress = progress or Progress(quiet=True)
    n_tokens = sum(map(len, windows))
    with progress.stage("capture", n_tokens) as step:
        captured = capture(model, kv, windows, progress=step)
    with progress.stage("fit", model.spec.block_count) as step:
        layers = {}
        for il, layer in enumerate(captured):
            layers[il] = fit_layer(model, kv, il, layer, entries, metric, state, seed)
            step(1)
    return Memory(
        model=model.spec,
        prefix_tokens=prefix.tokens,
        prefix_text=prefix.text,
        prefix_messages=prefix.messages,
        segment_offset=[0, len(prefix.tokens)],
        layers=[layers],
        build={
            "query_tokens": n_tokens,
            "entries": entries,
            "metric": metric,
            "state": state,
            "seed": seed,
            "attnmem": version("attnmem-local"),
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
        },
    )


def fit_layer(
    model: BuildModel, kv: PrefixKV, il: int, captured: Captured, entries: int, metric: Metric, state: EntryState, seed: int
) -> LayerMemory:
    """Centroids of one layer and the graph over them."""
    heads = []
    for h in range(model.spec.head_count_kv):
        k, v = kv.k[il][h], kv.v[il][h]
        q, o, lse = (x[h].to(model.device) for x in (captured.q, captured.o, captured.lse))
        centroid, nearest = cluster(q, entries, metric, torch.Generator().manual_seed(seed))
        states = exact_state(centroid, k, v, model.spec.scale) if state == "exact" else mean_state(o, lse, nearest)
        heads.append(centroid_entries(centroid, states, metric))
    centroid = join_heads(heads, model.to_gguf_order)
    keys = [rows(centroid.key[centroid.head(h)]) for h in range(len(heads))]
    centroid.graph = build_graph(keys, seed, threads=os.cpu_count() or 1)
    return LayerMemory(centroid)


def exact_memory(model: BuildModel, prefix: Prefix, kv: PrefixKV) -> Memory:
    """Anchors = every key and value of the prefix: the memory that must equal the prefix itself."""
    layers = {
        il: LayerMemory(anchor=join_heads([exact_anchors(k, v) for k, v in zip(kv.k[il], kv.v[il])], model.to_gguf_order))
        for il in range(model.spec.block_count)
    }
    return Memory(model.spec, prefix.tokens, prefix.text, [layers], [0, len(prefix.tokens)], prefix.messages)


def _bytes_per_entry(model: BuildModel) -> int:
    """Of a centroid: key and value in float16, bias, log-sum-exp, and its links on level 0."""
    return 2 * (model.spec.key_length + model.spec.value_length) + 4 + 4 + 4 * 2 * M


def _prefix(model: BuildModel, prefix, system: bool) -> Prefix:
    if isinstance(prefix, Prefix):
        return prefix
    if isinstance(prefix, list):
        return chat_prefix(model.tokenizer, prefix)
    return read_prefix(model.tokenizer, prefix, system)
