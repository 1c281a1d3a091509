"""The search for the nearest entry: HNSW and lists against an exact scan, from 256 to 65,536 entries per KV head.

Entries are live queries of one layer of the default model over real text after a real prefix, each a centroid; the queries
that look them up are of other text. Recall@1: how often a search finds the entry that the scan finds. Scored: entries and
lists that the op scores for one query, by its own count. µs per query: one thread; single tokens, with the cost of the call,
and batches of 64 tokens, where the scan is a matrix product. Load: the file with its lists and its graph, read and checked.
The captured queries are kept under build/bench/.
"""

import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import click
import numpy as np

from attnmem_local.engine import native
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.content import read_content
from attnmem_local.memory.entries import Entries, LayerMemory
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.prefix import Prefix
from attnmem_local.memory.tables import quantize_rows, rows
from attnmem_local.runtime.llama import MemoryLlama

from ..common import record
from ..common.builder import build_model, captured, gguf_order, searchable
from ..common.cases import FULL, QUICK, Size, document
from ..common.paths import BOOK, BUILD, SERVER_README

LAYER = 15
SIZES, QUICK_SIZES = (256, 1024, 2048, 4096, 16384, 65536), (256, 2048)
LOOKUPS = ("scan", "hnsw", "lists")
WINDOW, BATCHES, REPEAT = 384, (1, 64), 5
N_TEST = 1536  # tokens whose queries look up


@click.command(help=__doc__)
@record.options
def main(quick: bool, keep: bool) -> None:
    sizes, repeat = (QUICK_SIZES, 1) if quick else (SIZES, REPEAT)
    known, test = live_queries(max(sizes))
    llama = MemoryLlama(str(DEFAULT_MODEL), verbose=False)
    measured = []
    for n in sizes:
        path = write_memory(known, n, [LAYER])
        memory = llama.load_memory(path)
        row = {"entries": n, "file_bytes": path.stat().st_size, "load_ms": load_ms(llama, path, repeat)}
        exact = native.state(memory.handle, LAYER, test, "scan")
        for lookup in LOOKUPS:
            for batch in BATCHES:
                row[f"us_{lookup}_{batch}"] = timed(memory.handle, test, lookup, batch, repeat)
        for lookup in LOOKUPS[1:]:
            states, n_scored = native.search(memory.handle, LAYER, test, lookup)
            row[f"scored_{lookup}"] = n_scored / (test.shape[0] * test.shape[1])
            row[f"recall_at_1_{lookup}"] = float((exact == states).all(-1).mean())
        measured.append(row)
    record.finish(f"search.{record.instructions()}", measured, key=("entries",), quick=quick, keep=keep, layer=LAYER)


def live_queries(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries to make n entries of, float32 [n_head_kv, n or more, d], and to look up, [n_tokens, n_head, d].

    Of a novel after the README; small numbers, which only trials have, of the README alone.
    """
    path = BUILD / f"queries-{LAYER}-{n}.npz"
    if not path.exists():
        model = build_model()
        small = n <= max(QUICK_SIZES)
        n_test = 64 if small else N_TEST
        n_tokens = -(-n * model.spec.head_count_kv // model.spec.head_count) + n_test
        prefix = text_prefix(QUICK if small else FULL)
        _, text = document(SERVER_README if small else BOOK, len(prefix.tokens) + n_tokens)
        text = text[-n_tokens:]
        windows = [text[i : i + WINDOW] for i in range(0, n_tokens, WINDOW)]
        _, layers = captured(prefix, windows)
        q = gguf_order(layers[LAYER].q)
        q = q.reshape(len(q), -1, n_tokens, q.shape[-1])  # [n_head_kv, n_group, n_tokens, d]
        known, test = q[:, :, n_test:], q[:, :, :n_test].transpose(2, 0, 1, 3)
        np.savez(path, known=known.reshape(len(q), -1, q.shape[-1]), test=test.reshape(n_test, -1, q.shape[-1]))
    saved = np.load(path)
    return saved["known"], saved["test"]


def text_prefix(size: Size) -> Prefix:
    tokenizer, tokens = document(SERVER_README, size.prefix)
    return Prefix(tokens, tokenizer.decode(tokens))


def write_memory(known: np.ndarray, n: int, layers: Iterable[int]) -> Path:
    """A memory with the same n entries per KV head in some layers."""
    prefix = text_prefix(FULL)
    chosen = np.random.default_rng(0).permutation(known.shape[1])[:n]
    entries = table([head[chosen] for head in known])
    by_layer = {layer: LayerMemory(centroid=entries) for layer in layers}
    path = BUILD / "search.mem.gguf"
    Memory(build_model().spec, prefix.tokens, prefix.text, [by_layer], prefix.offset).save(path)
    return path


def table(heads: list[np.ndarray]) -> Entries:
    """Each query a centroid, in 8 bits; its state is its number, so that states tell which entry was found."""
    key = quantize_rows(np.concatenate(heads).astype(np.float32))
    square = np.square(rows(key)).sum(-1)
    number = np.concatenate([np.arange(len(head), dtype=np.float32) for head in heads])
    offset = np.cumsum([0, *map(len, heads)], dtype=np.int32)
    return searchable(Entries(key, -square / 2, np.zeros_like(key), offset, lse=number), heads, seed=0)


def timed(handle: int, q: np.ndarray, lookup: str, batch: int, repeat: int) -> float:
    """Median µs per query."""
    seconds = []
    for _ in range(repeat):
        for i in range(0, len(q), batch):
            start = time.perf_counter()
            native.state(handle, LAYER, q[i : i + batch], lookup)
            seconds.append((time.perf_counter() - start) / len(q[i : i + batch]) / q.shape[1])
    return 1e6 * statistics.median(seconds)


def load_ms(llama: MemoryLlama, path: Path, repeat: int) -> float:
    """Median ms to load a memory."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        content = read_content(path)
        handle = native.init(llama.model, content)
        seconds.append(time.perf_counter() - start)
        native.free(handle)
    return 1000 * statistics.median(seconds)
