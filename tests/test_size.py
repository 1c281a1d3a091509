"""How large a memory becomes, and the door to every kind of table."""

import click
import numpy as np
import pytest

from attnmem_local.builder import build as building
from attnmem_local.builder.build import build_memory
from attnmem_local.builder.job import Build
from attnmem_local.builder.size import TABLES, Size
from attnmem_local.builder.update import update_memory
from attnmem_local.cli.build import build as build_command
from attnmem_local.memory.entries import KINDS
from attnmem_local.memory.memory import Memory

TEXT = np.random.default_rng(8).integers(300, 1024, (14, 64)).tolist()  # traces as lists of tokens


def counts(memory) -> dict[str, int]:
    """Entries per KV head of each kind that the memory has; all heads have the same number."""
    n = {kind.name: memory.n_entries(kind.name) for kind in KINDS}
    assert all(x.min() == x.max() for x in n.values())
    return {name: int(x.max()) for name, x in n.items() if x.any()}


@pytest.mark.parametrize(
    "size, expected",
    [
        ({"anchors": 0, "entries": 48}, {"centroid": 48}),
        ({"anchors": 0, "entries": 48, "table": "tangent"}, {"tangent": 48}),
        ({"anchors": 8, "entries": 48}, {"residual": 48, "anchor": 8}),
        ({"anchors": 8}, {"anchor": 8}),
        ({"anchors": 1000, "entries": 48}, {"anchor": 240}),  # exact: a table would have nothing to correct
    ],
    ids=str,
)
def test_every_table_has_a_door(tiny32, tmp_path, size, expected):
    """Looked-up entries have lists and a graph, and their bytes are known before the build."""
    build_memory(tiny32.model, tiny32.prefix, tmp_path / "a.mem.gguf", queries=[TEXT], **size)
    memory = Memory.load(tmp_path / "a.mem.gguf")
    assert counts(memory) == expected
    for layer in memory.layers[0].values():
        assert layer.anchor is None or (layer.anchor.lists is None and layer.anchor.graph is None)
        for kind in (layer.centroid, layer.tangent, layer.residual):
            assert kind is None or (kind.lists is not None and kind.graph is not None)
    assert memory.nbytes() == pytest.approx(Size(**size).total_bytes(Build(tiny32.model, tiny32.prefix)), rel=0.03)  # + offsets
    assert memory.fidelity["kl_mean"] < memory.fidelity["kl_none"]


@pytest.mark.slow
def test_entries_come_on_top_of_a_share(tiny32):
    plain, tabled = (build_memory(tiny32.model, tiny32.prefix, queries=[TEXT], share=0.25, entries=n) for n in (0, 64))
    assert (plain.n_entries("anchor") == tabled.n_entries("anchor")).all() and not plain.n_entries("residual").any()
    fitted = tabled.n_entries("anchor") < 240
    assert (tabled.n_entries("residual")[fitted] == 64).all() and fitted.any()
    assert tabled.build["plan"].endswith("bytes and 64 entries per KV head")


@pytest.mark.slow
def test_an_update_keeps_the_tables_of_a_memory(tiny, tmp_path):
    """A changed part gets as many entries as the old memory has, and the same share of bytes for its anchors."""
    paths = [tmp_path / f"{i}.md" for i in range(3)]
    for path, text in zip(paths, ("Green tea costs 4 euros.\n", "We open at nine.\n", "Black tea costs 3 euros.\n")):
        path.write_text(6 * text)
    for size in ({"share": 0.25, "entries": 20}, {"anchors": 0, "entries": 20}):
        old = build_memory(tiny.model, paths[:2], queries=["repeat"], **size)
        new = update_memory(old, tiny.model, [paths[0], paths[2]], queries=["repeat"])
        kind = "residual" if "share" in size else "centroid"
        assert (new.n_entries(kind)[0] == old.n_entries(kind)[0]).all()
        assert 0 < new.n_entries(kind)[1].max() <= 20 and old.n_entries(kind)[1].max() <= 20
        assert new.n_entries("anchor").any() == ("share" in size)
        assert new.nbytes() < 1.3 * old.nbytes()


REFUSED = [
    ({"share": 0.5, "nbytes": 1000}, "either as a share or in bytes"),
    ({"share": 0.0}, "more than 0; give a larger"),
    ({"share": 0.5, "anchors": 8}, "either a number of anchors per KV head"),
    ({"nbytes": 1000, "anchors": 0, "entries": 8}, "either a number of anchors per KV head"),
    ({"anchors": 0}, "would be empty; add --entries"),
    ({"anchors": 0, "entries": 0}, "would be empty; add --entries"),
    ({"entries": -1}, "cannot be negative"),
    ({"anchors": -1}, "cannot be negative"),
    ({"entries": 8, "table": "tangent"}, "only without anchors"),
    ({"anchors": 0, "entries": 8, "table": "token"}, "choose one of centroid, tangent"),
]


@pytest.mark.parametrize("size, says", REFUSED, ids=str)
def test_sizes_that_make_no_sense_are_refused_before_the_model_is_loaded(tiny, monkeypatch, size, says):
    monkeypatch.setattr(building, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=says):
        build_memory(tiny.path, [{"role": "system", "content": "x"}], **size)


def test_more_entries_than_queries_are_refused_before_the_work(tiny):
    with pytest.raises(ValueError, match=r"2000 entries per KV head are more than the 1792 queries .* fewer --entries"):
        build_memory(tiny.model, tiny.prefix, anchors=0, entries=2000, queries=[TEXT])


def test_the_command_knows_all_tables():
    option = next(param for param in build_command.params if param.name == "table")
    assert isinstance(option.type, click.Choice) and tuple(option.type.choices) == TABLES
