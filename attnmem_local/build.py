"""From a prefix to a memory, top to bottom."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Literal, Sequence

import torch

from .capture import PrefixKV, capture_queries, prefill
from .entries import STATES, Metric, exact_anchors, fit_centroids, join_heads
from .hnsw import build_graph
from .memory import LayerMemory, Memory
from .model import BuildModel, load_model
from .prefix import Prefix, chat_prefix, read_prefix, text_prefix
from .progress import Progress
from .queries import read_traces, repeat_prefill, self_study, traces

WINDOW = 384  # tokens of live text in one window


def build_memory(
    model: str | os.PathLike | BuildModel,
    prefix: str | os.PathLike | list[dict] | Prefix,
    out: str | os.PathLike | None = None,
    *,
    queries: Sequence[str | list] = ("repeat", "self-study"),
    entries: int = 2048,
    metric: Metric = "l2",
    state: Literal["exact", "mean"] = "exact",
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

    with progress.stage("prefill", len(prefix.tokens)) as step:
        kv = prefill(model, prefix.tokens, progress=step)

    texts: list[list[int]] = []
    for source in queries:
        if source == "self-study":
            with progress.stage("self-study", windows * WINDOW) as step:
                texts += self_study(model, prefix, kv, windows, WINDOW, seed, step)
        elif source == "repeat":
            texts += repeat_prefill(prefix, WINDOW)
        else:
            texts += traces(model, prefix, source if isinstance(source, list) else read_traces(source), WINDOW)
    if not texts:
        raise ValueError("there are no queries to build from; give traces, 'repeat' or 'self-study'")

    with progress.stage("capture", sum(map(len, texts))) as step:
        captured = capture_queries(model, kv, texts, progress=step)

    with progress.stage("fit", model.spec.block_count) as step:
        layers = {}
        for il, q in enumerate(captured):
            layers[il] = fit_layer(model, kv, il, q, entries, metric, state, seed)
            step(1)

    memory = Memory(
        model=model.spec,
        prefix_tokens=prefix.tokens,
        prefix_text=prefix.text,
        prefix_messages=prefix.messages,
        segment_offset=[0, len(prefix.tokens)],
        layers=[layers],
        build={
            "queries": ", ".join(s if isinstance(s, str) else f"{len(s)} traces" for s in queries),
            "query_tokens": sum(map(len, texts)),
            "entries": entries,
            "metric": metric,
            "state": state,
            "seed": seed,
            "attnmem": version("attnmem-local"),
            "torch": str(torch.__version__),
            "transformers": version("transformers"),
        },
    )
    if out is not None:
        with progress.stage("write"):
            memory.save(out)
    return memory


def fit_layer(
    model: BuildModel, kv: PrefixKV, il: int, q: torch.Tensor, entries: int, metric: Metric, state: str, seed: int
) -> LayerMemory:
    """Centroids of one layer and the graph over them; q float32 [n_head_kv, n, d_k]."""
    assert state in STATES
    heads = [
        fit_centroids(
            q[h].to(model.device),
            entries,
            lambda x: tuple(s[0] for s in PrefixKV([kv.k[il][h, None]], [kv.v[il][h, None]]).state(0, x[None], model.spec.scale)),
            metric,
            state,
            generator=torch.Generator().manual_seed(seed),
        )
        for h in range(len(q))
    ]
    centroid = join_heads(heads, model.to_gguf_order)
    return LayerMemory(centroid, build_graph(centroid, seed, threads=os.cpu_count() or 1))


def exact_memory(model: BuildModel, prefix: Prefix, kv: PrefixKV) -> Memory:
    """Anchors = every key and value of the prefix: the memory that must equal the prefix itself."""
    layers = {
        il: LayerMemory(anchor=join_heads([exact_anchors(k, v) for k, v in zip(kv.k[il], kv.v[il])], model.to_gguf_order))
        for il in range(model.spec.block_count)
    }
    return Memory(model.spec, prefix.tokens, prefix.text, [layers], [0, len(prefix.tokens)], prefix.messages)


def _prefix(model: BuildModel, prefix, system: bool) -> Prefix:
    if isinstance(prefix, Prefix):
        return prefix
    if isinstance(prefix, list):
        return chat_prefix(model.tokenizer, prefix)
    return read_prefix(model.tokenizer, prefix, system)
