"""The search for the nearest entry: HNSW and lists against an exact scan, from 256 to 65,536 entries per KV head.

Entries are live queries of one layer of the default model over real text after a real prefix, each a centroid; the queries
that look them up are of other text. Recall@1: how often a search finds the entry that the scan finds. Comparisons of HNSW:
rows of the table that are scored for one query, counted in a walk of the same graph in Python, which must find what the
runtime finds; once with the number of candidates (ef) of the runtime, and once with the same ef for all sizes. µs per query:
one thread; single tokens, with the cost of the call, and batches of 64 tokens, where the scan is a matrix product. Load: the
file with its lists and its graph, read and checked. The captured queries are kept under build/bench/.
"""

import heapq
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
from ..common.shapes import n_probe

LAYER = 15
SIZES, QUICK_SIZES = (256, 1024, 2048, 4096, 16384, 65536), (256, 2048)
EF_ALL = 48  # for every size; that of the runtime grows with the table
LOOKUPS = ("scan", "hnsw", "lists")
WINDOW, N_COUNTED, BATCHES, REPEAT = 384, 100, (1, 64), 5
N_TEST = 1536  # tokens whose queries look up


@click.command(help=__doc__)
@record.options
def main(quick: bool, keep: bool) -> None:
    sizes, n_counted, repeat = (QUICK_SIZES, 4, 1) if quick else (SIZES, N_COUNTED, REPEAT)
    known, test = live_queries(max(sizes))
    n_head_kv, n_group = len(known), test.shape[1] // len(known)
    llama = MemoryLlama(str(DEFAULT_MODEL), verbose=False)
    measured = []
    for n in sizes:
        path, entries = write_memory(known, n, [LAYER])
        memory = llama.load_memory(path)
        row, state = {"entries": n, "file_bytes": path.stat().st_size, "load_ms": load_ms(llama, path, repeat)}, {}
        for lookup in LOOKUPS:
            for batch in BATCHES:
                state[lookup], row[f"us_{lookup}_{batch}"] = timed(memory.handle, test, lookup, batch, repeat)
        for lookup in LOOKUPS[1:]:
            row[f"recall_at_1_{lookup}"] = float((state["scan"] == state[lookup]).all(-1).mean())
        heads = [(h, test[t, h * n_group]) for t in range(n_counted) for h in range(n_head_kv)]
        row["comparisons_lists"] = statistics.fmean(listed(entries, h, q) for h, q in heads)
        for name, ef in (("", runtime_ef(n)), (f"_ef{EF_ALL}", EF_ALL)):
            values, counts = zip(*(walk(entries, h, q, ef) for h, q in heads))
            row[f"comparisons{name}"] = statistics.fmean(counts)
            walked = np.array(values).reshape(n_counted, -1)
            for lookup in ("hnsw", "scan"):
                row[f"walk{name}_as_{lookup}"] = float((walked == state[lookup][:n_counted, ::n_group, -1]).mean())
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


def write_memory(known: np.ndarray, n: int, layers: Iterable[int]) -> tuple[Path, Entries]:
    """A memory with the same n entries per KV head in some layers."""
    prefix = text_prefix(FULL)
    chosen = np.random.default_rng(0).permutation(known.shape[1])[:n]
    entries = table([head[chosen] for head in known])
    by_layer = {layer: LayerMemory(centroid=entries) for layer in layers}
    path = BUILD / "search.mem.gguf"
    Memory(build_model().spec, prefix.tokens, prefix.text, [by_layer], prefix.offset).save(path)
    return path, entries


def table(heads: list[np.ndarray]) -> Entries:
    """Each query a centroid, in 8 bits; its state is its number, so that states tell which entry was found."""
    key = quantize_rows(np.concatenate(heads).astype(np.float32))
    square = np.square(rows(key)).sum(-1)
    number = np.concatenate([np.arange(len(head), dtype=np.float32) for head in heads])
    offset = np.cumsum([0, *map(len, heads)], dtype=np.int32)
    return searchable(Entries(key, -square / 2, np.zeros_like(key), offset, lse=number), heads, seed=0)


def timed(handle: int, q: np.ndarray, lookup: str, batch: int, repeat: int) -> tuple[np.ndarray, float]:
    """States, and median µs per query."""
    states, seconds = [], []
    for i in range(0, len(q), batch):
        states.append(native.state(handle, LAYER, q[i : i + batch], lookup))
    for _ in range(repeat):
        for i in range(0, len(q), batch):
            start = time.perf_counter()
            native.state(handle, LAYER, q[i : i + batch], lookup)
            seconds.append((time.perf_counter() - start) / len(q[i : i + batch]) / q.shape[1])
    return np.concatenate(states), 1e6 * statistics.median(seconds)


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


def runtime_ef(n: int) -> int:
    """As mem_hnsw_ef in native/ggml/src/ggml-cpu/mem-search.h."""
    return 16 if n <= 4096 else 24 if n <= 16384 else 48


def walk(entries: Entries, h: int, q: np.ndarray, ef: int) -> tuple[float, int]:
    """The log-sum-exp of the entry that a search of head h finds, and the number of rows it scores."""
    head, graph = entries.head(h), entries.graph
    key, bias, q = rows(entries.key[head]), entries.bias[head], q.astype(np.float32)
    link0, upper = graph.link0[head], graph.upper[head.start : head.stop + 1]
    node = int(graph.entry[h])
    best, count = float(key[node] @ q + bias[node]), 1
    for level in range(upper[node + 1] - upper[node] - 1, -1, -1):
        moved = True
        while moved:
            links = graph.link[upper[node] + level]
            links = links[links >= 0]
            score = key[links] @ q + bias[links]
            count += len(links)
            moved = bool(len(links)) and score.max() > best
            if moved:
                node, best = int(links[score.argmax()]), float(score.max())
    seen, open_, candidates = {node}, [(-best, node)], [(best, node)]
    while open_ and not (-open_[0][0] < candidates[0][0] and len(candidates) >= ef):
        links = [i for i in link0[heapq.heappop(open_)[1]].tolist() if i >= 0 and i not in seen]
        seen.update(links)
        count += len(links)
        for score, i in zip((key[links] @ q + bias[links]).tolist(), links):
            if len(candidates) < ef or score > candidates[0][0]:
                heapq.heappush(open_, (-score, i))
                heapq.heappush(candidates, (score, i))
                if len(candidates) > ef:
                    heapq.heappop(candidates)
    return float(entries.lse[head][max(candidates)[1]]), count


def listed(entries: Entries, h: int, q: np.ndarray) -> int:
    """The number of rows that a search of the lists of head h scores: all means, and the entries of the best lists."""
    lists = entries.lists
    of_head = slice(lists.head[h], lists.head[h + 1])
    score = rows(lists.key[of_head]) @ q.astype(np.float32) + lists.bias[of_head]
    best = np.argsort(-score)[: n_probe(int(np.diff(entries.offset).max()))]
    return of_head.stop - of_head.start + int(np.diff(lists.offset)[of_head][best].sum())
