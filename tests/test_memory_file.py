"""The memory file is untrusted input: each way it can be wrong has its own error, in Python and in native code."""

import copy
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from mixed import mixed_memory
from tiny import write_tiny

from attnmem_local import errors, memory as memory_module
from attnmem_local.build import build_memory
from attnmem_local.cli.common import DEFAULT_MODEL
from attnmem_local.memory import Memory, quantize_rows, rows
from attnmem_local.runtime import MemoryLlama


@pytest.fixture(scope="module")
def good(tiny):
    return tiny.fitted(entries=24)


@pytest.fixture(scope="module")
def llama(tiny):
    return MemoryLlama(str(tiny.path), verbose=False)


@pytest.fixture(scope="module")
def mixed(tiny32):
    """Every kind of entries, in Q8_0."""
    return mixed_memory(tiny32.model.spec, tiny32.prefix, q8_0=True)


@pytest.fixture(scope="module")
def llama32(tiny32):
    return MemoryLlama(str(tiny32.path), verbose=False)


def refused_by_both(llama, path, error, match=None):
    with pytest.raises(error, match=match):
        Memory.load(path)
    with pytest.raises(error, match=match):
        llama.load_memory(path)


def same(a, b):
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    return a == b or (isinstance(a, float) and np.float32(a) == np.float32(b))


def test_round_trip(tiny, good):
    good.prefix_messages = [{"role": "system", "content": "Grüße\n"}]
    good.fidelity = {"kl_mean": 0.25}
    assert same(Memory.load(tiny.save(good, "good")), good)
    good.prefix_messages, good.fidelity = None, {}


def test_round_trip_of_all_kinds(tiny32, mixed):
    path = tiny32.save(mixed, "mixed")
    assert same(Memory.load(path), mixed)
    assert mixed.nbytes() == sum(int(t.n_bytes) for t in gguf.GGUFReader(path).tensors)


def test_q8_0_rows():
    x = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    table = quantize_rows(x)
    assert table.shape == (5, 2 * 34)
    assert np.abs(rows(table) - x).max() <= np.abs(x).max() / 127 * 0.51
    assert rows(quantize_rows(x[:0])).shape == (0, 64)
    with pytest.raises(OverflowError, match="does not fit into Q8_0"):
        quantize_rows(x * 1e8)


def test_same_inputs_and_seed_give_the_same_file(tiny):
    a, b, c = (tiny.save(tiny.fitted(seed=seed), name).read_bytes() for seed, name in ((1, "a"), (1, "b"), (2, "c")))
    assert a == b != c


def test_truncated_at_every_boundary(tiny, good, llama, tmp_path):
    path = tiny.save(good, "whole")
    data = path.read_bytes()
    reader = gguf.GGUFReader(path)
    ends = {int(t.data_offset) + end for t in reader.tensors for end in (0, 1, t.n_bytes - 1)}
    header = min(int(t.data_offset) for t in reader.tensors)
    cut = tmp_path / "cut.mem.gguf"
    for size in sorted(ends | set(range(4, 64)) | set(range(64, header, 211))):
        cut.write_bytes(data[:size])
        refused_by_both(llama, cut, errors.Truncated)
    for size in range(4):
        cut.write_bytes(data[:size])
        refused_by_both(llama, cut, errors.NotAMemory)


def test_flipped_header_bytes_never_crash(tiny, good, llama, tmp_path):
    path = tiny.save(good, "whole")
    data = path.read_bytes()
    header = min(int(t.data_offset) for t in gguf.GGUFReader(path).tensors)
    rng = np.random.default_rng(0)
    flipped = tmp_path / "flipped.mem.gguf"
    outcomes = set()
    for at in rng.integers(4, header, 400):
        bad = bytearray(data)
        bad[at] ^= rng.integers(1, 256)
        flipped.write_bytes(bad)
        for load in (Memory.load, lambda p: MemoryLlama.load_memory(llama, p)):
            llama._loaded.clear()
            try:
                load(flipped)
                outcomes.add("loaded")  # a byte of the prefix text, say
            except errors.MemoryRefused as error:
                outcomes.add(error.reason)
    assert {"truncated", "invalid", "wrong_model"} <= outcomes


def _centroid(m):
    return m.layers[0][1].centroid


def _graph(m):
    return m.layers[0][1].centroid.graph


def _set(holder, part, index, value):
    array = np.array(getattr(holder, part))
    array[index] = value
    setattr(holder, part, array)


def _as(holder, part, dtype):
    setattr(holder, part, getattr(holder, part).astype(dtype))


INVALID = {
    "NaN key": lambda m: _set(_centroid(m), "key", (3, 2), np.nan),
    "infinite value": lambda m: _set(_centroid(m), "value", (0, 0), np.inf),
    "bias that would overflow": lambda m: _set(_centroid(m), "bias", 0, -3e38),
    "messages that are not chat": lambda m: setattr(m, "prefix_messages", {"role": "system"}),
    "too many segments": lambda m: (setattr(m, "layers", m.layers + [{}] * 300), setattr(m, "segment_offset", m.segment_offset + [len(m.prefix_tokens)] * 300)),
    "NaN log-sum-exp": lambda m: _set(_centroid(m), "lse", 5, np.nan),
    "+inf log-sum-exp": lambda m: _set(_centroid(m), "lse", 5, np.inf),
    "offsets descend": lambda m: _set(_centroid(m), "offset", 1, 1000),
    "offsets end early": lambda m: _set(_centroid(m), "offset", -1, 3),
    "negative offset": lambda m: _set(_centroid(m), "offset", 0, -1),
    "link beyond the table": lambda m: _set(_graph(m), "link0", (2, 0), 24),
    "link of −2": lambda m: _set(_graph(m), "link0", (2, 0), -2),
    "upper link to an entry without that level": lambda m: (_set(_graph(m), "upper", slice(1, None), 1), _set(_graph(m), "link", (0, 0), 7)),
    "upper link beyond the table": lambda m: _set(_graph(m), "link", (0, 0), 1 << 30),
    "upper rows beyond the links": lambda m: _set(_graph(m), "upper", -1, 1 << 30),
    "entry point beyond the table": lambda m: _set(_graph(m), "entry", 0, 24),
    "negative entry point": lambda m: _set(_graph(m), "entry", 0, -1),
    "log-sum-exp in float16": lambda m: _as(_centroid(m), "lse", np.float16),
    "keys as integers": lambda m: _as(_centroid(m), "key", np.int32),
    "links as floats": lambda m: _as(_graph(m), "link0", np.float32),
    "too few values": lambda m: setattr(_centroid(m), "value", _centroid(m).value[:-1]),
    "keys too short": lambda m: setattr(_centroid(m), "key", _centroid(m).key[:, :-1]),
    "too few biases": lambda m: setattr(_centroid(m), "bias", _centroid(m).bias[:-1]),
    "missing log-sum-exp": lambda m: setattr(_centroid(m), "lse", None),
    "missing links": lambda m: setattr(_graph(m), "link", None),
    "layer beyond the model": lambda m: m.layers[0].update({9: m.layers[0][0]}),
    "segments do not cover the prefix": lambda m: setattr(m, "segment_offset", [0, 1]),
    "no segments": lambda m: (setattr(m, "layers", []), setattr(m, "segment_offset", [len(m.prefix_tokens)])),
}


@pytest.mark.parametrize("what", INVALID)
def test_invalid_content(tiny, good, llama, what):
    bad = copy.deepcopy(good)
    INVALID[what](bad)
    refused_by_both(llama, tiny.save(bad, "bad"), errors.Invalid)
    llama._loaded.clear()


def _layer(m):
    return m.layers[0][1]


INVALID_KINDS = {
    "residual without anchors": lambda m: setattr(_layer(m), "anchor", None),
    "residual of a head without anchors": lambda m: _set(_layer(m).anchor, "offset", 1, 0),
    "residual with an empty state": lambda m: _set(_layer(m).residual, "lse", 0, -np.inf),
    "token without top_k": lambda m: setattr(m, "token_top_k", None),
    "top_k of 0": lambda m: setattr(m, "token_top_k", 0),
    "top_k of 1025": lambda m: setattr(m, "token_top_k", 1025),
    "Q8_0 rows of another width": lambda m: setattr(_layer(m).anchor, "key", np.hstack([_layer(m).anchor.key] * 2)),
    "too few Q8_0 rows": lambda m: setattr(_layer(m).token, "value", _layer(m).token.value[1:]),
    "infinite Q8_0 scale": lambda m: _set(_layer(m).tangent, "value", (2, slice(2)), [0, 0x7C]),
    "NaN Q8_0 scale": lambda m: _set(_layer(m).token, "key", (-1, slice(2)), [1, 0xFC]),
    "biases in Q8_0": lambda m: setattr(_layer(m).anchor, "bias", _layer(m).anchor.key),
    "log-sum-exp of a tangent": lambda m: setattr(_layer(m).tangent, "lse", _layer(m).tangent.bias),
    "residual without log-sum-exp": lambda m: setattr(_layer(m).residual, "lse", None),
    "link beyond the tangents": lambda m: _set(_layer(m).tangent.graph, "link0", (3, 0), 50),
    "upper link beyond the tokens": lambda m: _set(_layer(m).token.graph, "link", (0, 0), 60),
    "entry point beyond the residuals": lambda m: _set(_layer(m).residual.graph, "entry", 0, 30),
    "empty list": lambda m: _set(_layer(m).residual.lists, "offset", 1, 0),
    "lists beyond the tangents": lambda m: _set(_layer(m).tangent.lists, "offset", -1, 51),
    "lists that are not those of their head": lambda m: _set(_layer(m).centroid.lists, "head", 1, 1),
    "a list with an infinite score": lambda m: _set(_layer(m).tangent.lists, "bias", 0, np.inf),
    "lists of anchors": lambda m: setattr(_layer(m).anchor, "lists", _layer(m).tangent.lists),
    "graph of anchors": lambda m: setattr(_layer(m).anchor, "graph", _layer(m).token.graph),
}


@pytest.mark.parametrize("what", INVALID_KINDS)
def test_invalid_content_of_the_other_kinds(tiny32, mixed, llama32, what):
    bad = copy.deepcopy(mixed)
    INVALID_KINDS[what](bad)
    refused_by_both(llama32, tiny32.save(bad, "bad"), errors.Invalid)
    llama32._loaded.clear()


def test_q8_0_in_heads_narrower_than_its_blocks(tiny, good, llama):
    bad = copy.deepcopy(good)
    _centroid(bad).key = quantize_rows(np.tile(rows(_centroid(bad).key), 2))
    refused_by_both(llama, tiny.save(bad, "bad"), errors.Invalid)


def test_token_outside_the_vocabulary(tiny, good, llama):
    bad = copy.deepcopy(good)
    bad.prefix_tokens = [1 << 20, *bad.prefix_tokens[1:]]
    with pytest.raises(errors.Invalid, match="vocabulary"):
        llama.load_memory(tiny.save(bad, "bad-token"))


def test_other_version(tiny, good, llama, monkeypatch):
    monkeypatch.setattr(memory_module, "FORMAT_VERSION", 99)
    path = tiny.save(good, "version")
    monkeypatch.undo()
    refused_by_both(llama, path, errors.WrongVersion, "99")


def test_not_a_memory(llama, tiny, tmp_path):
    refused_by_both(llama, tiny.path, errors.NotAMemory)
    text = tmp_path / "text.mem.gguf"
    text.write_text("hello")
    refused_by_both(llama, text, errors.NotAMemory)
    refused_by_both(llama, tmp_path / "missing.mem.gguf", errors.Unreadable)


def test_other_model_and_other_finetune(tiny, good, tmp_path):
    path = tiny.save(good, "good")
    qwen = MemoryLlama(str(write_tiny(tmp_path / "qwen2.gguf", DEFAULT_MODEL, "qwen2")), verbose=False)
    with pytest.raises(errors.WrongModel, match="architecture llama, this one has qwen2"):
        qwen.attach(path)
    finetune = MemoryLlama(str(write_tiny(tmp_path / "finetune.gguf", DEFAULT_MODEL, norm_seed=1)), verbose=False)
    with pytest.raises(errors.WrongFinetune, match="another fine-tune"):
        finetune.attach(path)
    assert finetune.memories == ()


def test_the_fingerprint_survives_quantization(tiny, good, default_model, f32_model, default_build_model):
    """The same memory fits the quantized default and its F32 copy."""
    memory = copy.deepcopy(good)
    memory.model = default_build_model.spec
    memory.layers = [{}]
    path = tiny.save(memory, "empty")
    for model in (default_model, f32_model):
        assert MemoryLlama(str(model), memory=path, verbose=False).memories


def test_a_full_disk_is_said_before_anything_is_written(tiny, good, monkeypatch):
    monkeypatch.setattr(memory_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="the disk has 0.0 MB left"):
        good.save(tiny.folder / "full.mem.gguf")
    with pytest.raises(OSError, match="the disk has 0.0 MB left"):
        build_memory(tiny.model, tiny.prefix, tiny.folder / "full.mem.gguf")
    assert not list(tiny.folder.glob("full*"))


def test_a_failed_write_keeps_the_old_file(tiny, good, monkeypatch):
    path = tiny.save(good, "kept")
    before = path.read_bytes()

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        good.save(path)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.part"))
