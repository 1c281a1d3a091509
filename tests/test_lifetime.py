"""Copying, closing and saving the state of a MemoryLlama."""

import copy
import pickle
import shutil

import llama_cpp
import pytest
from helpers.answers import ask, open_llama
from helpers.interrupt import Interrupt

from attnmem_local.memory import errors


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda llama: pickle.loads(pickle.dumps(llama))])
def test_copies_carry_the_memories(tiny, one, two, duplicate):
    llama = open_llama(tiny, one, lookup="scan", memory_mmap=True)
    llama.attach(two, gain=-0.5)
    other = duplicate(llama)
    assert [(a.memory.path, a.gain) for a in other.memories] == [(one, 0.0), (two, -0.5)]
    assert other.lookup == "scan" and other._attachments.mapped
    assert ask(other, tiny.live) == ask(llama, tiny.live)
    other.detach()
    assert len(llama.memories) == 2


def test_a_copy_is_refused_when_a_memory_has_changed(tiny, one, two, tmp_path):
    path = tmp_path / "memory.gguf"
    shutil.copy(one, path)
    pickled = pickle.dumps(open_llama(tiny, path))
    shutil.copyfile(two, path)
    with pytest.raises(errors.MemoryRefused, match="has changed since"):
        pickle.loads(pickled)


# closing

USES = {
    "attach": lambda llama, one: llama.attach(one),
    "detach": lambda llama, one: llama.detach(),
    "load": lambda llama, one: llama.load_memory(one),
    "lookup": lambda llama, one: llama.set_lookup("scan"),
    "eval": lambda llama, one: llama.eval([1]),
    "sample": lambda llama, one: llama.sample(),
    "generate": lambda llama, one: next(llama.generate([1])),
    "completion": lambda llama, one: llama.create_completion("x"),
    "tokens": lambda llama, one: llama.create_completion([1]),
    "stream": lambda llama, one: next(llama.create_completion([1], stream=True)),
    "chat": lambda llama, one: llama.create_chat_completion([{"role": "user", "content": "x"}]),
    "grammar": lambda llama, one: llama("x", grammar=llama_cpp.LlamaGrammar.from_string('root ::= "a"', verbose=False)),
    "save": lambda llama, one: llama.save_state(),
    "tokenize": lambda llama, one: llama.tokenize(b"x"),
    "detokenize": lambda llama, one: llama.detokenize([1]),
    "n_ctx": lambda llama, one: llama.n_ctx(),
    "n_vocab": lambda llama, one: llama.n_vocab(),
    "eos": lambda llama, one: llama.token_eos(),
    "ctx": lambda llama, one: llama.ctx,
    "model": lambda llama, one: llama.model,
    "pickle": lambda llama, one: pickle.dumps(llama),
}


def test_use_after_close_is_an_exception(tiny, one):
    llama = open_llama(tiny, one)
    llama.eval(tiny.live)
    state = llama.save_state()
    streams = [llama.create_completion(tiny.live, max_tokens=9, stream=True), llama.generate(tiny.live)]
    next(streams[1])
    llama.close()
    llama.close()
    assert llama.memories == ()
    for name, use in {**USES, "load state": lambda llama, one: llama.load_state(state)}.items():
        with pytest.raises(ValueError, match="closed"):
            use(llama, one)
            pytest.fail(name)
    for stream in streams:
        with pytest.raises(ValueError, match="closed"):
            next(stream)


def test_a_refused_memory_leaves_no_model_open(tiny, monkeypatch):
    closed = []
    monkeypatch.setattr(llama_cpp.Llama, "close", lambda self, close=llama_cpp.Llama.close: closed.append(1) or close(self))
    with pytest.raises(errors.Unreadable) as refused:
        open_llama(tiny, "missing")
    assert closed and refused.value


# saved states


def test_a_plain_llama_refuses_a_state_saved_with_memories(tiny, one):
    llama = open_llama(tiny, one)
    llama.eval(tiny.live)
    state = pickle.loads(pickle.dumps(llama.save_state()))
    plain = llama_cpp.Llama(str(tiny.path), verbose=False)
    with pytest.raises(errors.MemoryRefused, match="with memories attached"):
        plain.load_state(state)
    assert plain.n_tokens == 0
    llama.attach(one, gain=-1.0)
    with pytest.raises(errors.MemoryRefused, match="same gains"):
        llama.load_state(state)
    plain.eval(tiny.live)
    llama.detach()
    llama.load_state(plain.save_state())  # without memories, the state of a plain Llama fits


@pytest.mark.parametrize("how", ["damaged", "interrupted"])
def test_a_state_that_fails_to_load_leaves_no_tokens_behind(tiny, one, answers, monkeypatch, how):
    llama = open_llama(tiny, one)
    llama.eval(tiny.live)
    state = llama.save_state()
    llama.reset()
    llama.eval(tiny.live[::-1])
    with monkeypatch.context() as patch:
        if how == "damaged":
            state._state.llama_state = state._state.llama_state[: state.llama_state_size // 2]
            state._state.llama_state_size //= 2
        else:
            patch.setattr(llama_cpp.llama_cpp, "llama_state_set_data", Interrupt.now)
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            llama.load_state(state)
    assert ask(llama, tiny.live) == answers[one,]


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_objects_that_share_a_prompt_cache_never_share_answers(tiny, one, two, answers, kind, tmp_path, capfd):
    cache = llama_cpp.LlamaRAMCache() if kind == "ram" else llama_cpp.LlamaDiskCache(str(tmp_path))
    llamas = {key: open_llama(tiny, key) for key in answers}
    for _ in range(2):
        for key, llama in llamas.items():
            llama.set_cache(cache)
            cache = llama.cache  # handed on to the next object, as a user would
            llama.reset()
            assert ask(llama, tiny.live) == answers[key]
