"""Several contexts that share one copy of the weights, and memories in RAM."""

import gc
import os
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.answers import ask, open_llama

from attnmem_local.evaluate.scorer import Scorer, kl
from attnmem_local.memory import errors
from attnmem_local.memory.memory import Memory
from attnmem_local.runtime.llama import MemoryLlama


def rss() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_contexts_with_other_memories_share_the_weights(tiny, one, two, answers):
    first = open_llama(tiny, one)
    second, bare = first.new_context(memory=two), first.new_context()
    both = second.new_context(memory=[one, two])
    for _ in range(2):  # in turn, twice, to show that contexts do not disturb each other
        for llama, paths in ((first, (one,)), (second, (two,)), (bare, ()), (both, (one, two))):
            assert ask(llama, tiny.live) == answers[paths]
    assert both.memories[0].memory is first.memories[0].memory  # loaded once
    first.close()
    assert ask(both, tiny.live) == answers[one, two]
    assert ask(bare, tiny.live) == answers[()]
    for llama in (second, bare):
        llama.close()
    assert both._model.model is not None
    model = both._model
    both.close()
    assert model.model is None  # the last context to close frees the weights


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="RSS is read from /proc")
def test_weights_are_in_ram_once(default_model):
    llama = Scorer(default_model, n_live=64, use_mmap=False)
    before = rss()
    others = [Scorer(llama, n_live=64) for _ in range(3)]
    bytes_each = (rss() - before) / len(others)
    assert [int(s.log_probs([1, 2, 3])[-1].argmax()) for s in others] == [int(llama.log_probs([1, 2, 3])[-1].argmax())] * 3
    assert bytes_each < default_model.stat().st_size / 2


def test_an_option_of_the_model_is_refused_for_another_context(tiny):
    with pytest.raises(TypeError, match="n_gpu_layers"):
        open_llama(tiny).new_context(n_gpu_layers=1)


def test_a_context_that_cannot_be_created_keeps_no_reference_to_the_weights(tiny, two):
    first = open_llama(tiny)
    with pytest.raises(errors.MemoryRefused):
        first.new_context(memory=tiny.path)
    model = first._model
    first.close()
    assert model.model is None


def test_a_memory_in_ram_answers_like_its_file(tiny, one, answers):
    llama = open_llama(tiny, Memory.load(one))
    assert ask(llama, tiny.live) == answers[(one,)]
    attached = llama.memories[0].memory
    assert attached.path is None and attached.prefix_tokens == tiny.prefix.tokens
    assert llama.attach(attached, gain=1.0) is attached and len(llama.memories) == 1
    llama.detach(attached)
    assert ask(llama, tiny.live) == answers[()]


def test_the_content_in_ram_is_what_save_writes(tiny, tmp_path, one):
    memory = Memory.load(one)
    memory.save(tmp_path / "again.mem.gguf")
    assert bytes(memory.content()) == (tmp_path / "again.mem.gguf").read_bytes()


def test_a_memory_in_ram_is_not_pickled(tiny, one):
    with pytest.raises(TypeError, match="save it to a file"):
        pickle.dumps(open_llama(tiny, Memory.load(one)))


def test_rewritten_rows_take_effect_in_every_context(tiny, one, two, answers):
    """Memory two differs from memory one by its biases only, so rewriting them turns one into two."""
    memory, other = Memory.load(one), Memory.load(two)
    first = open_llama(tiny, memory)
    loaded = first.memories[0].memory
    second = first.new_context(memory=loaded)
    assert ask(first, tiny.live) == ask(second, tiny.live) == answers[(one,)]
    fingerprint = loaded.fingerprint
    for il, layer in other.layers[0].items():
        loaded.rewrite(0, il, "anchor", 0, bias=layer.anchor.bias)
    assert ask(first, tiny.live) == ask(second, tiny.live) == answers[(two,)]
    assert loaded.fingerprint != fingerprint
    state = first.save_state()
    loaded.rewrite(0, 0, "anchor", 3, bias=np.zeros(1, np.float32))
    with pytest.raises(errors.MemoryRefused, match="other memories"):
        first.load_state(state)


def test_a_stream_ends_when_rows_are_rewritten(tiny, one):
    llama = open_llama(tiny, Memory.load(one))
    stream = llama.create_completion(tiny.live, max_tokens=8, stream=True)
    next(stream)
    llama.memories[0].memory.rewrite(0, 0, "anchor", 0, bias=np.zeros(1, np.float32))
    with pytest.raises(errors.StaleStream):
        list(stream)


def test_rows_of_a_file_are_not_rewritten(tiny, one):
    with pytest.raises(errors.Unsupported, match="stands for a file"):
        open_llama(tiny, one).memories[0].memory.rewrite(0, 0, "anchor", 0, bias=np.zeros(1, np.float32))


@pytest.mark.parametrize(
    ("kind", "first", "tables"),
    [
        ("tangent", 0, {"bias": np.zeros(1, np.float32)}),  # no such table
        ("anchor", 10**6, {"bias": np.zeros(1, np.float32)}),
        ("anchor", -1, {"bias": np.zeros(1, np.float32)}),
        ("anchor", 0, {"bias": np.full(1, np.nan, np.float32)}),
        ("anchor", 0, {"key": np.zeros((1, 3), np.float16)}),
        ("anchor", 0, {"head": np.zeros((1, 3), np.int32)}),  # offsets, which could point outside of the tables
    ],
)
def test_rows_that_do_not_fit_are_refused_and_change_nothing(tiny, one, answers, kind, first, tables):
    llama = open_llama(tiny, Memory.load(one))
    loaded = llama.memories[0].memory
    fingerprint = loaded.fingerprint
    with pytest.raises(errors.MemoryRefused):
        loaded.rewrite(0, 0, kind, first, **tables)
    assert loaded.fingerprint == fingerprint
    assert ask(llama, tiny.live) == answers[(one,)]


def test_rewriting_gives_the_distribution_of_a_fresh_memory(tiny, one, two):
    changed = Scorer(tiny.path, memory=Memory.load(one), n_live=256)
    for il, layer in Memory.load(two).layers[0].items():
        changed.llama.memories[0].memory.rewrite(0, il, "anchor", 0, bias=layer.anchor.bias)
    fresh = Scorer(changed, memory=two, n_live=256)
    assert kl(fresh.log_probs(tiny.live), changed.log_probs(tiny.live)).max() < 1e-9


def test_a_model_that_is_gone_from_its_path_has_new_contexts(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny.path.parent)
    first = MemoryLlama(tiny.path.name, verbose=False)
    monkeypatch.chdir(tmp_path)
    second = first.new_context()
    assert ask(second, tiny.live) == ask(first, tiny.live)
    assert second.model_path == tiny.path.name  # what answers name


def test_a_llama_that_was_refused_holds_no_weights_while_its_error_is_handled(tiny):
    first = open_llama(tiny)
    model = first._model
    try:
        first.new_context(memory=tiny.path)
    except errors.MemoryRefused:
        first.close()
        assert model.model is None


def test_closed_contexts_leave_nothing_with_the_model(tiny, one):
    first = open_llama(tiny)
    handles = []
    for _ in range(3):
        other = first.new_context(memory=one)
        handles.append(weakref.ref(other.memories[0].memory))
        context = weakref.ref(other._ctx)
        other.close()
        del other
        gc.collect()
        assert context() is None and handles[-1]() is None
    assert len(first._model._exit_stack._functions) == 2  # the model, and the context of first


def test_contexts_in_a_garbage_cycle_are_freed_before_their_model(tiny, one):
    first = open_llama(tiny, one)
    first.cycle = first.new_context(memory=one)
    first.cycle.cycle = first
    model = first._model
    del first
    gc.collect()
    assert model.model is None


@pytest.mark.parametrize(
    ("first", "rows"),
    [(0, np.ones(1, np.int32)), (2**64, np.zeros(1, np.float32)), (0, np.zeros(1, np.float64))],
)
def test_rows_of_another_type_or_beyond_any_table_are_refused(tiny, one, first, rows):
    llama = open_llama(tiny, Memory.load(one))
    loaded = llama.memories[0].memory
    fingerprint = loaded.fingerprint
    with pytest.raises(errors.Invalid):
        loaded.rewrite(0, 0, "anchor", first, bias=rows)
    with pytest.raises(TypeError):
        loaded.rewrite(0, 0, "anchor", "x", bias=np.zeros(1, np.float32))
    assert loaded.fingerprint == fingerprint


def test_threads_load_attach_and_free_memories_of_one_model(tiny, one, two, answers):
    base = open_llama(tiny)

    def work(path):
        llama = base.new_context()
        for _ in range(20):
            llama.attach(path)
            llama.detach()
        llama.attach(path)
        answer = ask(llama, tiny.live)
        llama.close()
        return answer

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, [one, two] * 2)) == [answers[(one,)], answers[(two,)]] * 2
