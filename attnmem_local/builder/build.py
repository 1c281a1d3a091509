"""From a prefix to a memory, top to bottom."""

import os
from collections.abc import Sequence
from dataclasses import replace

from ..memory.entries import LayerMemory
from ..memory.errors import BadInput
from ..memory.files import check_space
from ..memory.memory import Memory, prefix_fields
from ..memory.prefix import Prefix
from ..prompt.prefix import chat_prefix, read_prefix
from .capture import PrefixKV, prefill
from .entries.anchor import exact_anchors
from .entries.head import join_heads
from .estimate import estimate_seconds
from .fidelity import held_out_fidelity
from .fit import fit_memory
from .inputs import check_inputs
from .job import Build
from .model import BuildModel, load_model
from .progress import Progress
from .size import Size
from .sources import DEFAULT_SOURCES, Query, open_source
from .tables import add_tables

HELD_OUT = 12  # one window in this many is not fitted to, but measured on


def build_memory(
    model: str | os.PathLike | BuildModel,
    prefix: str | os.PathLike | Sequence[str | os.PathLike] | list[dict] | Prefix,
    out: str | os.PathLike | None = None,
    *,
    share: float | None = None,
    nbytes: int | None = None,
    anchors: int | None = None,
    entries: int | None = None,
    table: str | None = None,
    queries: Sequence[Query] = DEFAULT_SOURCES,
    system: bool = False,
    tools: list[dict] | None = None,
    windows: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> Memory:
    """Build the memory of a prefix, and write it to `out` if given.

    model: a GGUF file or a transformers directory, or a loaded model.
    prefix: a file (text, or `.json` with chat messages), several files that together are the text, chat messages, or a
        Prefix. Each of several files is a segment of the memory, which update_memory can rebuild alone.
    share, nbytes: the size of the anchors, as a share of the prefix's F16 KV cache or in bytes.  [default: default_bytes]
    anchors: anchors per KV head, instead of a size; 0 for none.
    entries: looked-up entries per KV head, on top of the anchors, which they correct. With anchors=0 they stand for the prefix
        alone, as in the paper.  [default: none; from traces, tables are added if held-out traces show that they pay]
    table: with anchors=0, what is looked up: "centroid" (the paper) or "tangent".  [default: centroid]
    queries: where queries come from: "repeat", "self-study", the path of a file of traces, or a list of traces.
    system: the text of the file is the system message of a chat.
    tools: tools of the chat, as OpenAI clients send them; they become part of the prefix.
    windows: windows of live text that self-study writes.  [default: see study_shape]
    The same inputs and seed give the same file. Raises BadInput or OSError for bad input; writes nothing then.
    """
    progress = progress or Progress(quiet=True)
    check_inputs(model, prefix, queries, out)
    size = Size(share, nbytes, anchors, entries, table)
    if windows is not None and windows < 1:
        raise BadInput("self-study writes at least one window; give a larger number of windows")

    with progress.stage("load model"):
        model = model if isinstance(model, BuildModel) else load_model(model, device)
        build = Build(model, _prefix(model, prefix, system, tools), seed, progress, windows)
        if not build.prefix.tokens:
            raise BadInput("the prefix is empty; give a text, or chat messages")
        open_sources(build, queries)
        size.check(build)
        if out is not None:
            check_space(out, size.total_bytes(build))
    announce(build, size.anchor_bytes(build), size.entries or 0, size.anchors is None)

    with progress.stage("prefill", len(build.prefix.tokens)) as step:
        build.kv = prefill(model, build.prefix.tokens, progress=step)
    collect_text(build)
    memory = fit_memory(build, size.plan(build))
    if size.is_default and build.traces.windows:
        memory = add_tables(build, memory)
    measure(build, memory)
    if out is not None:
        with progress.stage("write"):
            memory.save(out)
    return memory


def open_sources(build: Build, queries: Sequence[Query]) -> None:
    """Read and check the sources of live text. Raises BadInput or OSError."""
    build.sources = [open_source(query, build) for query in queries]
    if not any(source.n_tokens for source in build.sources):
        raise BadInput("there are no queries to build from; give traces, 'repeat' or 'self-study'")


def announce(build: Build, anchor_bytes: int, n_entries: float, has_budget: bool = True) -> None:
    """Say how long a build will take, before it starts. For the arguments see estimate_seconds."""
    with build.progress.stage("estimate"):
        seconds = estimate_seconds(build, anchor_bytes, n_entries, has_budget)
    build.progress.expect(sum(n * length for n, length in (source.written for source in build.sources)), seconds)


def collect_text(build: Build) -> None:
    """Get the windows of all sources, and hold some out."""
    for source in build.sources:
        windows = source.windows(build)
        for text in (build.text, build.traces) if source.is_real else (build.text,):
            text.windows += [w for i, w in enumerate(windows) if i % HELD_OUT != HELD_OUT // 2]
            text.held_out += windows[HELD_OUT // 2 :: HELD_OUT]


def measure(build: Build, memory: Memory) -> None:
    """Record the fidelity on text that the memory was not fitted to, if any was held out."""
    if build.text.held_out:
        with build.progress.stage("check"):
            memory.fidelity = held_out_fidelity(build.model, build.kv, memory, build.text.held_out)


def exact_memory(model: BuildModel, prefix: Prefix, kv: PrefixKV) -> Memory:
    """The memory that must equal the prefix itself: every key and value of it is an anchor."""
    layers = {
        il: LayerMemory(anchor=join_heads([exact_anchors(k, v) for k, v in zip(kv.k[il], kv.v[il])], model.to_gguf_order))
        for il in range(model.spec.block_count)
    }
    whole = replace(prefix, offset=[0, len(prefix.tokens)])  # one segment, however many parts the prefix has
    return Memory(model.spec, layers=[layers], **prefix_fields(whole))


def _prefix(model: BuildModel, prefix, system: bool, tools: list[dict] | None) -> Prefix:
    if isinstance(prefix, Prefix):
        return prefix
    if isinstance(prefix, (str, os.PathLike)):
        prefix = [prefix]
    if not prefix or isinstance(prefix[0], dict):
        return chat_prefix(model.tokenizer, prefix, tools=tools)
    return read_prefix(model.tokenizer, prefix, system, tools)
