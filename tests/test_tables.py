"""Tables that a build from real traces adds by itself: only if held-out traces show that they pay."""

import numpy as np
import pytest

from attnmem_local.builder.build import build_memory
from attnmem_local.builder.progress import Progress


class Said(Progress):
    """Remembers what a build says about traces."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, line):
        if "traces" in line:
            self.lines.append(line)


def traces(kind: str) -> list[list[int]]:
    """As tokens: "same" texts, whose held-out queries are those that tables were fitted to, or "random" ones."""
    rng = np.random.default_rng(5)
    if kind == "same":
        return [rng.integers(300, 1024, 64).tolist()] * 30
    return rng.integers(300, 1024, (30, 64)).tolist()


@pytest.mark.slow
def test_tables_that_pay_are_added(tiny32):
    said = Said()
    memory = build_memory(tiny32.model, tiny32.prefix, queries=[traces("same")], progress=said)
    assert memory.n_entries("residual").any() and "entries in" in memory.build["plan"]
    (line,) = said.lines
    assert "lower the KL on held-out traces from" in line and "added" in line and "MB" in line
    without = build_memory(tiny32.model, tiny32.prefix, queries=[traces("same")], entries=0)
    assert memory.fidelity["kl_mean"] < 0.8 * without.fidelity["kl_mean"]
    assert memory.fidelity["kl_none"] == pytest.approx(without.fidelity["kl_none"])
    assert (memory.n_entries("anchor") == without.n_entries("anchor")).all()


def test_tables_that_do_not_pay_are_left_out(tiny32):
    said = Said()
    memory = build_memory(tiny32.model, tiny32.prefix, queries=[traces("random")], progress=said)
    assert not memory.n_entries("residual").any()
    (line,) = said.lines
    assert "do not pay" in line and "left out" in line


def test_too_few_traces_add_no_tables(tiny32):
    said = Said()
    memory = build_memory(tiny32.model, tiny32.prefix, queries=["repeat", traces("same")[:5]], progress=said)
    assert not memory.n_entries("residual").any() and "too few traces" in said.lines[0]


@pytest.mark.parametrize("size", [{"share": 1 / 8}, {"entries": 0}, {"anchors": 8}], ids=str)
def test_tables_are_added_only_by_default(tiny32, size):
    said = Said()
    memory = build_memory(tiny32.model, tiny32.prefix, queries=[traces("same")], progress=said, **size)
    assert not memory.n_entries("residual").any() and not said.lines


def test_no_tables_without_traces(tiny32):
    said = Said()
    build_memory(tiny32.model, tiny32.prefix, queries=["repeat"], progress=said)
    assert not said.lines
