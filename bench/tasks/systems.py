"""What answers the questions of a case: no prefix, the full prefix, memories, and their peers."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from attnmem_local.builder.build import build_memory
from attnmem_local.builder.progress import Progress
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.prefix import Prefix

from ..common.builder import build_model, uniform_memory
from ..common.scoring import kv_bytes
from ..peers import presses
from ..peers.attention_matching import matching_memory
from ..peers.runtime import QUANTIZED
from .cases import Case, Classifier

FULL, FULL_PYTORCH = "full prefix", "full prefix, PyTorch"
N_LONG = 5120  # tokens of the prefix with traces before it


def classify(case: Case, share: float, **context) -> dict:
    """Answers in the runtime after a fixed context, which takes this share of the bytes of the prefix."""
    threads = torch.get_num_threads()
    classifier = Classifier(case.labels, DEFAULT_MODEL, n_threads=threads, n_threads_batch=threads, **context)
    start = time.perf_counter()
    answers = [classifier(live) for live, _ in case.tests]
    seconds = time.perf_counter() - start
    classifier.close()
    return {"answers": answers, "share": share, "ms_per_test": 1000 * seconds / len(answers)}


def with_memory(case: Case, name: str, build: Callable[[], Memory]) -> dict:
    """Answers with a memory."""
    path = case.folder / f"{name}.mem.gguf"
    start = time.perf_counter()
    memory = build()
    seconds = time.perf_counter() - start
    memory.save(path)
    result = classify(case, memory.nbytes() / kv_bytes(len(case.prefix.tokens)), memory=path)
    path.unlink()
    return result | {"build_seconds": seconds, "build": memory.build}


def build(case: Case, prefix: Prefix, traces: list[list[int]], share: float) -> Memory:
    """A memory that takes a share of the bytes of the case's prefix."""
    texts = [build_model().tokenizer.decode(trace) for trace in traces]
    nbytes = int(share * kv_bytes(len(case.prefix.tokens)))
    return build_memory(build_model(), prefix, queries=[texts], nbytes=nbytes, progress=Progress())


def attnmem(case: Case, share: float) -> dict:
    return with_memory(case, "attnmem", lambda: build(case, case.prefix, case.traces, share))


def attnmem_long(case: Case, share: float) -> dict:
    """Traces as further demonstrations: they lengthen the prefix, not the memory."""
    tokens, rest = demonstrations(case)
    prefix = Prefix(tokens, build_model().tokenizer.decode(tokens))
    return with_memory(case, "attnmem-long", lambda: build(case, prefix, rest, share))


def demonstrations(case: Case) -> tuple[list[int], list[list[int]]]:
    """As many traces as fit before the prefix within N_LONG tokens, then the prefix; and the traces that are left."""
    tokens, n = [], 0
    while len(tokens) + len(case.traces[n]) + len(case.prefix.tokens) <= N_LONG:
        tokens += case.traces[n]
        n += 1
    return tokens + case.prefix.tokens, case.traces[n:]


def centroids(case: Case, entries: int) -> dict:
    """The nearest centroid alone, with the same number of entries in each head."""
    return with_memory(case, "centroids", lambda: uniform_memory(case.prefix, case.traces, entries=entries))


def attention_matching(case: Case, share: float) -> dict:
    return with_memory(case, "attention-matching", lambda: matching_memory(case, share))


def quantized_cache(case: Case, name: str) -> dict:
    ggml_type, share = QUANTIZED[name]
    return classify(case, share, prefix=case.prefix.tokens, type_k=ggml_type, type_v=ggml_type, flash_attn=True)


def kvpress(case: Case, share: float, press: str) -> dict:
    tests = [live for live, _ in case.tests]
    with presses.start(case, Path(DEFAULT_MODEL), False, labels=case.labels, tests=tests) as process:
        return presses.run(process, press, share)


SYSTEMS: dict[str, Callable[[Case], dict]] = {
    "no prefix": lambda case: classify(case, 0.0),
    FULL: lambda case: classify(case, 1.0, prefix=case.prefix.tokens),
    "half of the demonstrations": lambda case: classify(case, len(case.half) / len(case.prefix.tokens), prefix=case.half),
    "attnmem 1/4": partial(attnmem, share=1 / 4),
    "traces before the full prefix": lambda case: classify(case, N_LONG / len(case.prefix.tokens), prefix=demonstrations(case)[0]),
    "attnmem 1/4, traces before the prefix": partial(attnmem_long, share=1 / 4),
    "attnmem, equal bytes, traces before the prefix": partial(attnmem_long, share=1.0),
    "centroids, equal bytes": partial(centroids, entries=1280),  # with their search graphs and lists
    "attention matching 1/4": partial(attention_matching, share=1 / 4),
    **{f"KV cache in {name}": partial(quantized_cache, name=name) for name in QUANTIZED},
    FULL_PYTORCH: partial(kvpress, share=1.0, press="Knorm"),  # a press that drops nothing
    **{f"{press} 1/4": partial(kvpress, share=1 / 4, press=press) for press in presses.PRESSES},
}
