"""The demo: memories of one handbook, against the prefix itself and against none."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .builder.build import announce, collect_text, measure, open_sources
from .builder.capture import capture, prefill
from .builder.fit import fit_memory
from .builder.job import Build
from .builder.model import load_model
from .builder.progress import Progress
from .builder.size import Size
from .builder.sources import DEFAULT_SOURCES
from .engine import native
from .evaluate.scorer import Scorer, kl
from .memory.memory import Memory
from .prompt.live import live_chat
from .prompt.prefix import chat_prefix

HANDBOOK_CHARACTERS = 6000
ANSWER_TOKENS = 48
ENTRIES = 1024  # looked-up entries per KV head of the paper's memory
QUESTIONS = (
    "What is this handbook about?",  # its answers are shown; the KL is over all
    "Which option sets the number of threads to use?",
    "What does the option --mlock do?",
    "How do I set the size of the prompt context?",
)
FULL, ANCHORS, CENTROIDS, NONE = "full prefix", "memory", "centroids", "no prefix"


@dataclass
class Run:
    """What one way to have the prefix costs, and how it answers."""

    answer: str = ""  # to the first question
    first_token: float = 0.0  # seconds, from nothing loaded: model, prefix or memory, question
    token_seconds: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)  # to the full prefix, nats, per token of its answers

    @property
    def ms_per_token(self) -> float:
        return 1000 * statistics.median(self.token_seconds)


@dataclass
class Search:
    """Graph searches of the nearest of ENTRIES entries, for queries of live text."""

    n_queries: int
    n_scored: float  # entries that a search scored, the mean
    recall: float  # share of the searches that a scan agrees with


@dataclass
class Demo:
    memories: dict[str, Memory]
    runs: dict[str, Run]
    search: Search


def run_demo(model: Path, handbook: str, folder: Path, progress: Progress, tell: Callable[[dict[str, Memory]], None]) -> Demo:
    """Build the default memory of a handbook and the paper's, and ask both. tell: called with the memories once they are built.

    folder: where demo.mem.gguf and demo-centroids.mem.gguf are written.
    """
    paths = {ANCHORS: folder / "demo.mem.gguf", CENTROIDS: folder / "demo-centroids.mem.gguf"}
    build, memories = _build(model, handbook, progress)
    for name, memory in memories.items():
        memory.save(paths[name])
    tell(memories)

    options: dict[str, dict] = {
        FULL: {"prefix": build.prefix.tokens},
        ANCHORS: {"memory": paths[ANCHORS]},
        CENTROIDS: {"memory": paths[CENTROIDS], "lookup": "hnsw"},
        NONE: {},
    }
    questions = [live_chat(build.model.tokenizer, build.prefix, [{"role": "user", "content": q}]) for q in QUESTIONS]
    runs, scorers = {name: Run() for name in options}, {}
    for name, run in runs.items():
        start = time.monotonic()
        scorers[name] = Scorer(model, n_threads=os.cpu_count(), **options[name])
        next(scorers[name].decode(questions[0], 1))
        run.first_token = time.monotonic() - start

    texts = []  # questions with the answers of the full prefix
    for live in questions:
        answers = {}
        for name, run in runs.items():
            decoded = list(scorers[name].decode(live, ANSWER_TOKENS))
            answers[name] = [token for token, _ in decoded]
            run.token_seconds += [seconds for _, seconds in decoded[1:]]
            run.answer = run.answer or _text(scorers[name], answers[name])
        texts.append(live + answers[FULL])
        expected = scorers[FULL].log_probs(texts[-1])[len(live) - 1 :]
        for name, run in runs.items():
            run.kl += list(kl(expected, scorers[name].log_probs(texts[-1])[len(live) - 1 :]))
    return Demo(memories, runs, _search(build, scorers[CENTROIDS].llama.memories[0].memory.handle, texts))


def _build(model: Path, handbook: str, progress: Progress) -> tuple[Build, dict[str, Memory]]:
    """The steps of build_memory, with two fits to the same live text."""
    with progress.stage("load model"):
        loaded = load_model(model)
        text = "Answer questions about this handbook.\n\n" + handbook[:HANDBOOK_CHARACTERS]
        build = Build(loaded, chat_prefix(loaded.tokenizer, [{"role": "system", "content": text}]), progress=progress)
        open_sources(build, DEFAULT_SOURCES)
    sizes = {ANCHORS: Size(), CENTROIDS: Size(anchors=0, entries=ENTRIES)}
    announce(build, sizes[ANCHORS].anchor_bytes(build), ENTRIES)
    with progress.stage("prefill", len(build.prefix.tokens)) as step:
        build.kv = prefill(loaded, build.prefix.tokens, progress=step)
    collect_text(build)
    memories = {name: fit_memory(build, size.plan(build)) for name, size in sizes.items()}
    for memory in memories.values():
        measure(build, memory)
    return build, memories


def _search(build: Build, handle: int, texts: list[list[int]]) -> Search:
    """How the graphs of a memory lead to the nearest entries. handle: of the memory in the runtime."""
    spec, n_scored, agrees = build.model.spec, 0, []
    for il, target in enumerate(capture(build.model, build.kv, texts)):
        q = build.model.to_gguf_order(target.q).numpy()  # [n_head_kv, n, d_k]: the queries of a group of heads, which share a table
        q = q.reshape(spec.head_count_kv, -1, build.n_group, spec.key_length).swapaxes(0, 1)
        q = q.reshape(-1, spec.head_count, spec.key_length)
        states, n = native.search(handle, il, q, "hnsw")
        n_scored += n
        agrees.append((states == native.state(handle, il, q, "scan")).all(-1))
    n_queries = sum(a.size for a in agrees)
    return Search(n_queries, n_scored / n_queries, float(np.concatenate(agrees).mean()))


def _text(scorer: Scorer, tokens: list[int]) -> str:
    end = next((i for i, token in enumerate(tokens) if token == scorer.llama.token_eos()), len(tokens))
    return scorer.llama.detokenize(tokens[:end]).decode(errors="replace").strip()
