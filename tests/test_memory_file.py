"""The memory file is untrusted input: each defect is refused with its own error, by the Python and the native reader alike."""

import copy
import os
import struct
import time
from dataclasses import replace
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from fuzz.container import F32, I32, STRING, U8, U32, Value, array, parse, scalar, string, text
from helpers.mixed import mixed_memory
from helpers.tiny import write_tiny

from attnmem_local.builder.build import build_memory
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory import errors, files, writer
from attnmem_local.memory.format import FIDELITY
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.tables import quantize_rows, rows
from attnmem_local.runtime.llama import MemoryLlama


@pytest.fixture(scope="module")
def good(tiny):
    return tiny.fitted(entries=24)


@pytest.fixture(scope="module")
def llama(tiny):
    return MemoryLlama(str(tiny.path), verbose=False)


@pytest.fixture(scope="module")
def mixed(tiny32):
    """A memory with every kind of entries, in Q8_0."""
    return mixed_memory(tiny32.model.spec, tiny32.prefix, q8_0=True)


@pytest.fixture(scope="module")
def llama32(tiny32):
    return MemoryLlama(str(tiny32.path), verbose=False)


def refused_by_both(llama, path, error, match=None):
    with pytest.raises(error, match=match):
        Memory.load(path)
    with pytest.raises(error, match=match):
        llama.load_memory(path)


def same(a, b) -> bool:
    """Whether two memories, or two of their fields, are equal; numbers as float32."""
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
    memory = replace(
        good,
        prefix_messages=[{"role": "system", "content": "Grüße\n"}],
        fidelity={name: 0.25 for name in FIDELITY},
    )
    assert same(Memory.load(tiny.save(memory, "good")), memory)


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
    for position in rng.integers(4, header, 400):
        bad = bytearray(data)
        bad[position] ^= rng.integers(1, 256)
        flipped.write_bytes(bad)
        for load in (Memory.load, lambda p: MemoryLlama.load_memory(llama, p)):
            try:
                load(flipped)
                outcomes.add("loaded")  # harmless where, for example, the byte is part of the prefix text
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
    "too many segments": lambda m: (
        setattr(m, "layers", m.layers + [{}] * 300),
        setattr(m, "segment_offset", m.segment_offset + [len(m.prefix_tokens)] * 300),
    ),
    "NaN log-sum-exp": lambda m: _set(_centroid(m), "lse", 5, np.nan),
    "+inf log-sum-exp": lambda m: _set(_centroid(m), "lse", 5, np.inf),
    "offsets descend": lambda m: _set(_centroid(m), "offset", 1, 1000),
    "offsets end early": lambda m: _set(_centroid(m), "offset", -1, 3),
    "negative offset": lambda m: _set(_centroid(m), "offset", 0, -1),
    "link beyond the table": lambda m: _set(_graph(m), "link0", (2, 0), 24),
    "link of −2": lambda m: _set(_graph(m), "link0", (2, 0), -2),
    "upper link to an entry without that level": lambda m: (
        _set(_graph(m), "upper", slice(1, None), 1),
        _set(_graph(m), "link", (0, 0), 7),
    ),
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


@pytest.mark.parametrize("defect", INVALID)
def test_invalid_content(tiny, good, llama, defect):
    bad = copy.deepcopy(good)
    INVALID[defect](bad)
    refused_by_both(llama, tiny.save(bad, "bad"), errors.Invalid)


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


@pytest.mark.parametrize("defect", INVALID_KINDS)
def test_invalid_content_of_the_other_kinds(tiny32, mixed, llama32, defect):
    bad = copy.deepcopy(mixed)
    INVALID_KINDS[defect](bad)
    refused_by_both(llama32, tiny32.save(bad, "bad"), errors.Invalid)


def _key(name, value=None):
    """A mutation that sets a key, or removes it for None."""

    def change(c):
        c.keys = [(k, v) for k, v in c.keys if k != name] + ([] if value is None else [(name, value)])

    return change


def _tensor(c, part, **changes):
    """Sets fields of all tensors whose names end in a part; a callable is given the tensor."""
    for t in c.tensors:
        if t.name.endswith(part):
            for field, value in changes.items():
                setattr(t, field, value(t) if callable(value) else value)


HOSTILE = {
    "a NUL in a key": _key(b"attnmem.build.x\0y", scalar(U32, 1)),
    "a key that is not UTF-8": _key(b"attnmem.build.\xff", scalar(U32, 1)),
    "an empty key": _key(b"", scalar(U32, 1)),
    "a duplicated key": lambda c: c.keys.append(c.keys[-1]),
    "a NUL in the adapter's type": lambda c: _key(b"adapter.type", string(b"attention_state_memory\0y"))(c),
    "a NUL in the prefix": _key(b"attnmem.prefix.text", string(b"Hello\0")),
    "a prefix that is not UTF-8": _key(b"attnmem.prefix.text", string(b"\xc3")),
    "a surrogate in the prefix": _key(b"attnmem.prefix.text", string(b"\xed\xa0\x80")),
    "no prefix text": _key(b"attnmem.prefix.text"),
    "messages as numbers": _key(b"attnmem.prefix.messages", array(U8, b"[]", 2)),
    "messages that are not JSON": _key(b"attnmem.prefix.messages", string(b"[")),
    "a negative token": _key(b"attnmem.prefix.tokens", array(I32, b"\xff\xff\xff\xff" * 240, 240)),
    "a build parameter of another type": _key(b"attnmem.build.x", array(U8, b"", 0)),
    "a build parameter of NaN": _key(b"attnmem.build.x", scalar(F32, np.nan)),
    "incomplete fidelity": _key(b"attnmem.fidelity.kl_mean", scalar(F32, 0.1)),
    "fidelity that is text": _key(b"attnmem.fidelity.kl_mean", string(b"good")),
    "a scale of 0": _key(b"attnmem.attention.scale", scalar(F32, 0)),
    "a scale of NaN": _key(b"attnmem.attention.scale", scalar(F32, np.nan)),
    "a scale that would overflow": _key(b"attnmem.attention.scale", scalar(F32, 1e30)),
    "an infinite RoPE base": _key(b"attnmem.rope.freq_base", scalar(F32, np.inf)),
    "an alignment of 32": _key(b"general.alignment", scalar(U32, 32)),
    "no alignment": _key(b"general.alignment"),
    "an array that is longer than the file": _key(b"x", array(U8, b"", 1 << 62)),
    "an array whose bytes overflow": _key(b"x", array(I32, b"", 1 << 62)),
    "an array of arrays": _key(b"x", array(9, bytes(12), 1)),
    "a text that is longer than the file": _key(b"x", Value(STRING, text(b"y", (1 << 64) - 1))),
    "an array of 2**62 texts": _key(b"x", array(STRING, b"", 1 << 62)),
    "a count of keys that is too large": lambda c: c.counts.update(keys=1 << 15),
    "a count of tensors that is too large": lambda c: c.counts.update(tensors=len(c.tensors) + 1),
    "a count of 2**62 tensors": lambda c: c.counts.update(tensors=1 << 62),
    "GGUF version 2": lambda c: setattr(c, "version", 2),
    "a NUL in the name of a tensor": lambda c: _tensor(c, b".bias", name=lambda t: t.name + b"\0"),
    "a long name of a tensor": lambda c: _tensor(c, b".bias", name=b"x" * 64),
    "a duplicated tensor": lambda c: c.tensors.append(c.tensors[0]),
    "overlapping tensors": lambda c: _tensor(c, b".value", offset=0),
    "a tensor beyond the end": lambda c: _tensor(c, b".key", offset=1 << 62),
    "links of width 0": lambda c: _tensor(c, (b".link0", b".link"), dims=lambda t: [0, t.dims[1]], data=b""),
    "no entries": lambda c: _tensor(c, b".key", dims=lambda t: [t.dims[0], 0], data=b""),
    "dimensions that overflow": lambda c: _tensor(c, b".key", dims=[1 << 32, 1 << 32]),
    "five dimensions": lambda c: _tensor(c, b".key", dims=lambda t: [*t.dims, 1, 1, 1]),
    "a third dimension": lambda c: _tensor(c, b".key", dims=lambda t: [*t.dims, 2]),
}


@pytest.mark.parametrize("defect", HOSTILE)
def test_hostile_files_are_refused_by_both_readers(tiny, good, llama, tmp_path, defect):
    hostile = parse(tiny.save(good, "good").read_bytes())
    HOSTILE[defect](hostile)
    path = tmp_path / "hostile.mem.gguf"
    path.write_bytes(hostile.bytes())
    refused_by_both(llama, path, (errors.Invalid, errors.Truncated, errors.NotAMemory))


ODD = {
    "dimensions of 1 at the end": lambda c: _tensor(c, b".key", dims=lambda t: [*t.dims, 1, 1]),
    "tensors in another order": lambda c: c.tensors.reverse(),
    "unknown keys": lambda c: c.keys.extend([(b"general.tags", array(STRING, text(b"a") + text(b""), 2)), (b"x", scalar(U8, 1))]),
    "6 MB in an unknown key": _key(b"x", array(U8, bytes(6_000_000), 6_000_000)),
    "10,000 unknown keys": lambda c: c.keys.extend((f"x{i}".encode(), scalar(U8, 1)) for i in range(10_000)),
}


@pytest.mark.parametrize("oddity", ODD)
def test_odd_but_valid_files_load_quickly_in_both_readers(tiny, good, llama, tmp_path, oddity):
    odd = parse(tiny.save(good, "good").read_bytes())
    ODD[oddity](odd)
    path = tmp_path / "odd.mem.gguf"
    path.write_bytes(odd.bytes())
    for load in Memory.load, llama.load_memory:
        start = time.process_time()
        assert load(path).prefix_tokens == good.prefix_tokens
        assert time.process_time() - start < 0.5


@pytest.mark.parametrize("key", ["block_count", "attention.head_count", "attention.head_count_kv"])
def test_a_small_file_that_claims_to_be_large_is_refused_before_it_takes_ram(tiny, good, llama, tmp_path, key):
    large = parse(tiny.save(good, "good").read_bytes())
    large.tensors = []
    _key(f"attnmem.{key}".encode(), scalar(U32, 1 << 31))(large)
    path = tmp_path / "large.mem.gguf"
    path.write_bytes(large.bytes())
    with pytest.raises(errors.Invalid, match="expected 1 to"):
        Memory.load(path)
    with pytest.raises(errors.WrongModel):
        llama.load_memory(path)


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
    monkeypatch.setattr(writer, "FORMAT_VERSION", 99)
    path = tiny.save(good, "version")
    monkeypatch.undo()
    refused_by_both(llama, path, errors.WrongVersion, "99")


def test_not_a_memory(llama, tiny, tmp_path):
    refused_by_both(llama, tiny.path, errors.NotAMemory)
    text = tmp_path / "text.mem.gguf"
    text.write_text("hello")
    refused_by_both(llama, text, errors.NotAMemory)
    refused_by_both(llama, tmp_path / "missing.mem.gguf", errors.Unreadable)


def test_a_pipe_or_a_folder_given_as_a_memory_is_refused_at_once(llama, tmp_path):
    os.mkfifo(tmp_path / "pipe.mem.gguf")
    refused_by_both(llama, tmp_path / "pipe.mem.gguf", errors.Unreadable, "not a regular file")
    refused_by_both(llama, tmp_path, errors.Unreadable, "[Dd]irectory|not a regular file")


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


def test_a_full_disk_is_reported_before_a_build_begins(tiny, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="the disk has 0.0 MB left"):
        build_memory(tiny.model, tiny.prefix, tiny.folder / "full.mem.gguf")
    assert not list(tiny.folder.glob("*full*"))


def test_a_failed_write_keeps_the_old_file(tiny, good, monkeypatch):
    path = tiny.save(good, "kept")
    before = path.read_bytes()

    def interrupted(memory, file):
        file.write(before[: len(before) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr("attnmem_local.memory.memory.write_memory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        good.save(path)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.part"))


def test_a_length_beyond_any_file_is_refused(llama, tmp_path):
    """An array of two strings, the first of which claims 2^64 − 1 bytes."""
    path = tmp_path / "long.mem.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQQQ", 9, 8, 2, 2**64 - 1, 0))
    refused_by_both(llama, path, errors.Truncated)
