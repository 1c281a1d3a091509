"""The search for the nearest entry: HNSW and lists against exact scan, from 256 to 65,536 entries per KV head.

    .venv/bin/python bench/lookup.py [--layer 15] [--json]

Entries are live queries of one layer of the default model over real text after a real prefix, each a centroid of its own;
the queries that look them up are of other text. Recall@1: how often a search finds the entry that the scan finds.
Comparisons of HNSW: rows of the table that are scored for one query, counted in a walk of the same graph in Python, which also
has to find what the runtime finds; and the same with one number of candidates (ef) for all sizes. µs per query: one thread,
one token at a time (and with it the cost of a call), and in batches of 64 tokens, where the scan is a matrix product. Load:
the file, with its lists and its graph, mapped and checked. A run is written to results/ with a plot, its date and the
instructions that the runtime was compiled for. The captured queries are kept in build/.
"""

import heapq
import statistics
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import click
import matplotlib
import numpy as np
from prefixes import BOOK, BUILD, CASES, DATA, FULL, builder
from scoring import instructions, record, report
from shapes import n_probe

from attnmem_local.builder.build import searchable
from attnmem_local.builder.capture import capture, prefill
from attnmem_local.engine import native
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.content import read_content
from attnmem_local.memory.entries import Entries, LayerMemory
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.tables import quantize_rows, rows
from attnmem_local.runtime.llama import MemoryLlama

SIZES = (256, 1024, 2048, 4096, 16384, 65536)
EF_ALL = 48  # for every size; that of the runtime grows with the table
LOOKUPS = ("scan", "hnsw", "lists")
WINDOW, N_TEST, N_COUNTED, BATCHES = 384, 1536, 100, (1, 64)


@click.command()
@click.option("--layer", default=15, show_default=True)
@click.option("--repeat", default=5, show_default=True, help="Of the timing.")
@click.option("--json", "as_json", is_flag=True)
def main(layer: int, repeat: int, as_json: bool) -> None:
    known, test = captured(layer)
    n_head_kv, n_group = len(known), test.shape[1] // len(known)
    llama = MemoryLlama(str(DEFAULT_MODEL), verbose=False)
    measured = []
    for n in SIZES:
        path, entries = write_memory(known, n, [layer])
        memory = llama.load_memory(path)
        row, state = {"entries": n, "file_bytes": path.stat().st_size, "load_ms": load_ms(llama, path, repeat)}, {}
        for lookup in LOOKUPS:
            for batch in BATCHES:
                state[lookup], row[f"us_{lookup}_{batch}"] = timed(memory.handle, layer, test, lookup, batch, repeat)
        for lookup in LOOKUPS[1:]:
            row[f"recall_at_1_{lookup}"] = float((state["scan"] == state[lookup]).all(-1).mean())
        row["comparisons_lists"] = statistics.fmean(
            listed(entries, h, test[t, h * n_group]) for t in range(N_COUNTED) for h in range(n_head_kv)
        )
        for name, ef in (("", runtime_ef(n)), (f"_ef{EF_ALL}", EF_ALL)):
            counted = [walk(entries, h, test[t, h * n_group], ef) for t in range(N_COUNTED) for h in range(n_head_kv)]
            row[f"comparisons{name}"] = statistics.fmean(count for _, count in counted)
            found = np.array([value for value, _ in counted]).reshape(N_COUNTED, -1)
            row[f"walk{name}_as_hnsw"], row[f"walk{name}_as_scan"] = (
                float((found == state[lookup][:N_COUNTED, ::n_group, -1]).mean()) for lookup in ("hnsw", "scan")
            )
        measured.append(row)
    about = {"date": date.today().isoformat(), "layer": layer}
    plot(measured, record(f"lookup-{instructions()}", {**about, "rows": measured}).with_suffix(".png"))
    report(measured, as_json, **about)


def captured(layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries to make entries of, float32 [n_head_kv, n, d], and to look up, [n_tokens, n_head, d]."""
    path = BUILD / f"bench-queries-{layer}.npz"
    if not path.exists():
        model = builder()
        n_tokens = -(-max(SIZES) * model.spec.head_count_kv // model.spec.head_count) + N_TEST
        q = queries(model, CASES["readme"](FULL).prefix.tokens, layer, n_tokens)  # [n_head_kv, n_group, n_tokens, d]
        np.savez(path, known=q[:, :, N_TEST:].flatten(1, 2), test=q[:, :, :N_TEST].permute(2, 0, 1, 3).flatten(1, 2))
    found = np.load(path)
    return found["known"], found["test"]


def write_memory(known: np.ndarray, n: int, layers: Iterable[int]) -> tuple[Path, Entries]:
    """A memory with the same n entries per KV head in some layers."""
    prefix = CASES["readme"](FULL).prefix
    chosen = np.random.default_rng(0).permutation(known.shape[1])[:n]
    entries = table([own[chosen] for own in known])
    path = BUILD / "bench-lookup.mem.gguf"
    Memory(
        builder().spec, prefix.tokens, prefix.text, [{layer: LayerMemory(centroid=entries) for layer in layers}], prefix.offset
    ).save(path)
    return path, entries


def queries(model, prefix_tokens: list[int], layer: int, n_tokens: int):
    """Live queries of a layer over a novel, float32 in GGUF order [n_head_kv, n_group, n_tokens, d]."""
    text = model.tokenizer.encode((DATA / BOOK).read_text(encoding="utf-8")[: 8 * n_tokens], add_bos=False)[:n_tokens]
    windows = [text[i : i + WINDOW] for i in range(0, n_tokens, WINDOW)]
    target = capture(model, prefill(model, prefix_tokens), windows)[layer]
    return model.to_gguf_order(target.q).unflatten(1, (-1, n_tokens))


def table(heads: list[np.ndarray]) -> Entries:
    """Each query a centroid, in 8 bits; its state is a number of its own, so that states tell which entry was found."""
    key = quantize_rows(np.concatenate(heads).astype(np.float32))
    square = np.square(rows(key)).sum(-1)
    number = np.concatenate([np.arange(len(own), dtype=np.float32) for own in heads])
    offset = np.cumsum([0, *map(len, heads)], dtype=np.int32)
    return searchable(Entries(key, -square / 2, np.zeros_like(key), offset, lse=number), heads, seed=0)


def timed(handle: int, layer: int, q: np.ndarray, lookup: str, batch: int, repeat: int) -> tuple[np.ndarray, float]:
    """States, and median µs per query."""
    states, seconds = [], []
    for i in range(0, len(q), batch):
        states.append(native.state(handle, layer, q[i : i + batch], lookup))
    for _ in range(repeat):
        for i in range(0, len(q), batch):
            start = time.perf_counter()
            native.state(handle, layer, q[i : i + batch], lookup)
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
    """The log-sum-exp of the entry that a search of head h finds, and the rows it scores."""
    own, graph = entries.head(h), entries.graph
    key, bias, q = rows(entries.key[own]), entries.bias[own], q.astype(np.float32)
    link0, upper = graph.link0[own], graph.upper[own.start : own.stop + 1]
    at = int(graph.entry[h])
    best, count = float(key[at] @ q + bias[at]), 1
    for level in range(upper[at + 1] - upper[at] - 1, -1, -1):
        moved = True
        while moved:
            links = graph.link[upper[at] + level]
            links = links[links >= 0]
            score = key[links] @ q + bias[links]
            count += len(links)
            moved = bool(len(links)) and score.max() > best
            if moved:
                at, best = int(links[score.argmax()]), float(score.max())
    seen, open_, found = {at}, [(-best, at)], [(best, at)]
    while open_ and not (-open_[0][0] < found[0][0] and len(found) >= ef):
        links = [i for i in link0[heapq.heappop(open_)[1]].tolist() if i >= 0 and i not in seen]
        seen.update(links)
        count += len(links)
        for score, i in zip((key[links] @ q + bias[links]).tolist(), links):
            if len(found) < ef or score > found[0][0]:
                heapq.heappush(open_, (-score, i))
                heapq.heappush(found, (score, i))
                if len(found) > ef:
                    heapq.heappop(found)
    return float(entries.lse[own][max(found)[1]]), count


def listed(entries: Entries, h: int, q: np.ndarray) -> int:
    """The rows that a search of the lists of head h scores: all means, and the entries of the best lists."""
    lists = entries.lists
    own = slice(lists.head[h], lists.head[h + 1])
    best = np.argsort(-(rows(lists.key[own]) @ q.astype(np.float32) + lists.bias[own]))[
        : n_probe(int(np.diff(entries.offset).max()))
    ]
    return own.stop - own.start + int(np.diff(lists.offset)[own][best].sum())


def plot(measured: list[dict], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5))
    n = [row["entries"] for row in measured]
    left.plot(n, [row["comparisons"] for row in measured], marker="o", label="HNSW as in the runtime")
    left.plot(n, [row[f"comparisons_ef{EF_ALL}"] for row in measured], marker="o", label=f"HNSW, ef = {EF_ALL}")
    left.plot(n, [row["comparisons_lists"] for row in measured], marker="o", label="lists")
    left.set(xscale="log", ylim=0, xlabel="entries", ylabel="comparisons per query")
    left.legend()
    for name in LOOKUPS:
        for batch in BATCHES:
            right.plot(n, [row[f"us_{name}_{batch}"] for row in measured], marker="o", label=f"{name}, {batch} tokens")
    right.set(xscale="log", yscale="log", xlabel="entries", ylabel="µs per query")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
