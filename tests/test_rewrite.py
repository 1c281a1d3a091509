"""The rows of a memory that is attached are rewritten in place: the states are those of a new memory, the graph is the old one."""

import copy

import llama_cpp
import numpy as np
import pytest
from helpers.mixed import mixed_memory, random_queries

from attnmem_local.engine import native
from attnmem_local.memory import errors
from attnmem_local.memory.content import read_content
from attnmem_local.memory.tables import quantize_rows, rows
from attnmem_local.runtime.llama import MemoryLlama

TABLES = {"f16": lambda x: x.astype(np.float16), "f32": lambda x: x.astype(np.float32), "q8_0": quantize_rows}


class Loaded:
    """A memory in writable RAM, as one model has it loaded."""

    def __init__(self, llama, memory, path):
        memory.save(path)
        self.content = read_content(path)
        self.content.flags.writeable = True
        self.spec = memory.model
        self.handle = native.init(llama._model.model, self.content)

    def states(self, layer, lookup="scan"):
        q = random_queries(np.random.default_rng(1), 20, self.spec.head_count, self.spec.key_length)
        return native.state(self.handle, layer, q, lookup)


@pytest.fixture
def llama(tiny32):
    llama = MemoryLlama(str(tiny32.path), n_ctx=512, logits_all=True, verbose=False)
    yield llama
    native.set_memories(llama._ctx.ctx, [], [], "auto")


def plain_memory(tiny, table):
    """Every kind of entries, without graphs and lists, in tables of one type."""
    memory = mixed_memory(tiny.model.spec, tiny.prefix, q8_0=False)
    for entries in all_entries(memory):
        entries.graph = entries.lists = None
        entries.key, entries.value = (table(x.astype(np.float32)) for x in (entries.key, entries.value))
    return memory


def all_entries(memory):
    return [e for layers in memory.layers for layer in layers.values() for e in vars(layer).values() if e is not None]


def changed(memory, table, seed=0):
    """The memory with other numbers in rows of every tensor, and the rows as (tensor name, first row, rows)."""
    rng = np.random.default_rng(seed)
    memory, writes = copy.deepcopy(memory), []
    for segment, layers in enumerate(memory.layers):
        for il, layer in layers.items():
            for kind, entries in vars(layer).items():
                if entries is None:
                    continue
                first, last = len(entries.key) // 3, len(entries.key) - 1
                for part in ("key", "value", "bias", "lse"):
                    array = getattr(entries, part)
                    if array is None:
                        continue
                    new = rows(array[first:last]) if array.ndim == 2 else array[first:last]
                    new = new + rng.standard_normal(new.shape).astype(np.float32)
                    array[first:last] = table(new) if array.ndim == 2 else new
                    writes.append((f"seg.{segment}.blk.{il}.{kind}.{part}", first, array[first:last]))
    return memory, writes


def logits_of(llama, handle, tokens):
    native.set_memories(llama._ctx.ctx, [handle], [0.0], "auto")
    return decode(llama, tokens)


def n_reused(llama):
    """Decodes that took the graph of the one before."""
    return llama_cpp.llama_perf_context(llama._ctx.ctx).n_reused


def decode(llama, tokens):
    """Logits of tokens that are decoded one by one, in an empty context."""
    llama_cpp.llama_memory_clear(llama._ctx.memory, True)
    llama.reset()
    for token in tokens:
        llama.eval([token])
    return llama._scores[: len(tokens)].copy()


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_rewritten_rows_give_the_states_of_a_new_memory(tiny32, llama, tmp_path, table):
    memory = plain_memory(tiny32, table)
    new, writes = changed(memory, table)
    one, two = Loaded(llama, memory, tmp_path / "one.gguf"), Loaded(llama, new, tmp_path / "two.gguf")
    layers = range(memory.model.block_count)
    before = [one.states(layer) for layer in layers]
    for write in writes:
        native.set_rows(one.handle, *write)
    for layer in layers:
        for lookup in ("scan", "auto"):
            np.testing.assert_array_equal(one.states(layer, lookup), two.states(layer, lookup))
        assert not np.allclose(one.states(layer), before[layer], atol=0.1)
    np.testing.assert_array_equal(one.content, two.content)
    np.testing.assert_array_equal(logits_of(llama, one.handle, tiny32.live[:6]), logits_of(llama, two.handle, tiny32.live[:6]))


@pytest.mark.parametrize("options", [{}, {"flash_attn": True}], ids=["plain", "flash"])
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_token_reuses_the_graph_while_rows_are_rewritten(tiny32, tmp_path, table, options):
    llama = MemoryLlama(str(tiny32.path), n_ctx=512, logits_all=True, verbose=False, **options)
    memory = plain_memory(tiny32, table)
    loaded = Loaded(llama, memory, tmp_path / "memory.gguf")
    native.set_memories(llama._ctx.ctx, [loaded.handle], [0.0], "auto")
    llama.eval(tiny32.live[:4])
    llama.eval(tiny32.live[4:5])  # builds the graph of one token
    reused = n_reused(llama)
    for i, token in enumerate(tiny32.live[5:20]):
        memory, writes = changed(memory, table, seed=i)
        for write in writes:
            native.set_rows(loaded.handle, *write)
        llama.eval([token])
        assert n_reused(llama) == reused + i + 1
    new = Loaded(llama, memory, tmp_path / "new.gguf")
    rewritten = decode(llama, tiny32.live[:6])
    np.testing.assert_array_equal(rewritten, logits_of(llama, new.handle, tiny32.live[:6]))
    native.set_memories(llama._ctx.ctx, [], [], "auto")
    assert np.abs(rewritten - decode(llama, tiny32.live[:6])).max() > 0.1


KEY, BIAS = "seg.0.blk.1.anchor.key", "seg.0.blk.1.anchor.bias"
REFUSED = {
    "an unknown tensor": ("seg.0.blk.1.anchors.key", 0, 1, errors.Invalid, "no rows 'seg.0.blk.1.anchors.key'"),
    "a table of offsets": ("seg.0.blk.1.anchor.head", 0, 1, errors.Invalid, "no rows"),
    "a negative row": (KEY, -1, 1, errors.Invalid, "1 rows from row -1 on, but .* has 14 rows"),
    "a row behind the last": (KEY, 14, 1, errors.Invalid, "1 rows from row 14 on"),
    "more rows than the table has": (KEY, 10, 5, errors.Invalid, "5 rows from row 10 on"),
    "a position that overflows": (KEY, 2**63 - 1, 1, errors.Invalid, "rows from row 9223372036854775807 on"),
    "rows that are too short": (
        KEY,
        0,
        np.zeros((2, 31), np.float16),
        errors.Invalid,
        "124 bytes for 2 rows .* expected 64 bytes of type f16",
    ),
    "rows of another type": (KEY, 0, np.zeros((2, 32), np.float32), errors.Invalid, "256 bytes for 2 rows"),
    "a NaN in a key": (KEY, 0, np.full((1, 32), np.nan, np.float16), errors.Invalid, "not finite"),
    "a number that is too large": (BIAS, 0, np.float32([0, 2e15]), errors.Invalid, "not finite or larger than 1e"),
    "an empty state of a kind without them": ("seg.0.blk.1.residual.lse", 0, np.float32([-np.inf]), errors.Invalid, "not finite"),
    "an empty bias": ("seg.0.blk.1.centroid.bias", 0, np.float32([-np.inf]), errors.Invalid, "not finite"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_rows_that_do_not_fit_are_refused(tiny32, llama, tmp_path, case):
    name, first, new, error, words = case
    loaded = Loaded(llama, plain_memory(tiny32, TABLES["f16"]), tmp_path / "memory.gguf")
    before = loaded.content.copy()
    with pytest.raises(error, match=words):
        native.set_rows(loaded.handle, name, first, np.zeros((new, 32), np.float16) if isinstance(new, int) else new)
    np.testing.assert_array_equal(loaded.content, before)


def test_a_scale_of_q8_0_that_is_not_finite_is_refused(tiny32, llama, tmp_path):
    loaded = Loaded(llama, plain_memory(tiny32, quantize_rows), tmp_path / "memory.gguf")
    row = quantize_rows(np.ones((1, 32), np.float32))
    native.set_rows(loaded.handle, KEY, 0, row)
    row[0, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    with pytest.raises(errors.Invalid, match="not finite"):
        native.set_rows(loaded.handle, KEY, 0, row)


def test_a_centroid_may_become_empty(tiny32, llama, tmp_path):
    loaded = Loaded(llama, plain_memory(tiny32, TABLES["f16"]), tmp_path / "memory.gguf")
    native.set_rows(loaded.handle, "seg.0.blk.1.centroid.lse", 0, np.full(40, -np.inf, np.float32))
    assert np.isfinite(loaded.states(1)).all()  # those of the other kinds remain


@pytest.mark.parametrize("part", ["graph", "lists"])
def test_rows_that_have_a_search_are_refused(tiny32, llama, tmp_path, part):
    memory = mixed_memory(tiny32.model.spec, tiny32.prefix, q8_0=False)
    for entries in all_entries(memory):
        setattr(entries, part, None)
    loaded = Loaded(llama, memory, tmp_path / "memory.gguf")
    for kind in ("centroid", "tangent", "residual") + (("token",) if part == "lists" else ()):
        with pytest.raises(errors.Unsupported, match=r"has a search graph or lists, .* build the memory again"):
            native.set_rows(loaded.handle, f"seg.0.blk.1.{kind}.bias", 0, np.zeros(1, np.float32))
    native.set_rows(loaded.handle, BIAS, 0, np.zeros(1, np.float32))
