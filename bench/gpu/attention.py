"""The attention part alone: µs per layer with a prefix, with a memory, and without both; the bandwidth of the device."""

from ..common.paths import ROOT
from .run import Rows, Run, output, stage


@stage
def main(run: Run, rows: Rows) -> None:
    """µs per layer of attention alone, and the bandwidth of a copy on the device."""
    program = run.program(ROOT / "bench/gpu/attention.cpp")
    shape = run.shape()
    if not rows.has(what="copy"):
        rows.add(what="copy", gb_per_s=float(output(program, run.device, "copy")))
    bandwidth = next(row["gb_per_s"] for row in rows.rows if row["what"] == "copy")
    for what, sizes in (("none", (0,)), ("prefix", run.sizes.prefixes), ("memory", run.sizes.entries)):
        for n in sizes:
            for batch in run.sizes.batches:
                key = {"what": what, "n": n, "batch": batch}
                if rows.has(**key):
                    continue
                command = [program, run.device, "prefix" if what == "none" else what, n, batch]
                us = float(output(*command, shape.n_layer, shape.n_head, shape.n_head_kv, shape.d))
                nbytes = attention_bytes(shape, what, n, batch)
                rows.add(**key, us_per_layer=us, bytes=nbytes, share_of_bandwidth=nbytes / us / 1e3 / bandwidth)


def attention_bytes(shape, what: str, n: int, batch: int) -> int:
    """What one layer has to read for the prefix or the memory: all keys and values, or what a search reads."""
    from ..common.shapes import MIN_ENTRIES, n_lists, n_probe

    row = 2 * shape.d
    if what == "prefix":
        return shape.n_head_kv * n * 2 * row
    if what == "memory" and n < MIN_ENTRIES:  # a scan reads all keys and biases, a query one value
        return shape.n_head_kv * n * (row + 4) + shape.n_head * batch * row
    if what == "memory":  # the means of all lists, and for each query the keys of some; no row is counted twice
        searched = min(n, shape.n_head // shape.n_head_kv * batch * n_probe(n) * n / n_lists(n))
        return int(shape.n_head_kv * (n_lists(n) + searched) * (row + 4)) + shape.n_head * batch * row
    return 0
