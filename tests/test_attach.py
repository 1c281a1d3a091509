"""Changing memories while they are in use: streams, interrupts, live tokens."""

from itertools import count

import llama_cpp
import numpy as np
import pytest
from helpers.answers import N_NEW, ask, open_llama
from helpers.interrupt import Interrupt
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from attnmem_local.memory import errors


def answer_of(answers, llama):
    """The expected answer for the memories that are attached."""
    return answers[tuple(a.memory.path for a in llama.memories)]


CHANGES = {
    "attach": lambda llama, two: llama.attach(two),
    "detach": lambda llama, two: llama.detach(),
    "gain": lambda llama, two: llama.attach(llama.memories[0].memory, gain=-2.0),
    "lookup": lambda llama, two: llama.set_lookup("stock"),
    "attach and detach": lambda llama, two: (llama.attach(two), llama.detach(two)),
    "reset": lambda llama, two: llama.reset(),
    "another answer": lambda llama, two: llama.create_completion([5, 6, 7], max_tokens=1),
    "cleared cache": lambda llama, two: llama._ctx.kv_cache_clear(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["completion", "generate"])
def test_a_stream_raises_when_its_memories_change(tiny, one, two, answers, change, how):
    llama = open_llama(tiny, one)
    stream = llama.create_completion(tiny.live, max_tokens=64, stream=True) if how == "completion" else llama.generate(tiny.live)
    next(stream)
    CHANGES[change](llama, two)
    with pytest.raises(errors.StaleStream, match="changed while the stream was read"):
        list(stream)
    llama.detach()
    llama.attach(one)
    assert ask(llama, tiny.live) == answers[one,]


def test_a_prompt_made_for_other_memories_raises_when_its_stream_is_first_read(tiny, one):
    llama = open_llama(tiny, one)
    stream = llama.create_completion(tiny.prefix.tokens + tiny.live, stream=True)  # the prefix is removed in this call already
    llama.detach()
    with pytest.raises(errors.StaleStream):
        next(stream)


def test_a_stream_survives_a_refused_attach_and_one_without_effect(tiny, one, answers):
    llama = open_llama(tiny, one)
    stream = llama.create_completion(tiny.live, max_tokens=N_NEW, temperature=0, stream=True)
    text = next(stream)["choices"][0]["text"]
    llama.attach(one)
    with pytest.raises(errors.Unreadable):
        llama.attach("missing")
    with pytest.raises(errors.Invalid):
        llama.attach(one, gain=np.nan)
    assert text + "".join(chunk["choices"][0]["text"] for chunk in stream) == answers[one,]


@pytest.mark.parametrize("change", ["attach", "detach", "lookup"])
def test_an_interrupted_change_never_mixes_memories(tiny, one, two, answers, change):
    llama = open_llama(tiny, one)
    interrupted = 0
    for n in count(1):
        llama.eval(tiny.live)  # live tokens that a wrong implementation would reuse
        with Interrupt(n) as interrupt:
            {
                "attach": lambda: llama.attach(two),
                "detach": lambda: llama.detach(one),
                "lookup": lambda: llama.set_lookup("stock" if llama.lookup == "auto" else "auto"),
            }[change]()
        if interrupt.n > 0:  # the change was complete before line n
            break
        interrupted += 1
        assert ask(llama, tiny.live) == answer_of(answers, llama)
        llama.detach()
        llama.attach(one)
    assert interrupted > 10
    assert ask(llama, tiny.live) == answer_of(answers, llama)


def test_the_answer_after_an_interrupted_one_is_right(tiny, one, answers, monkeypatch):
    llama = open_llama(tiny, one)
    decode = llama._ctx.decode
    for n in range(1, 4):
        calls = count(1)

        def decode_then_interrupt(batch):
            decode(batch)
            if next(calls) == n:
                raise KeyboardInterrupt  # Ctrl-C during a decode is raised after it

        monkeypatch.setattr(llama._ctx, "decode", decode_then_interrupt)
        with pytest.raises(KeyboardInterrupt):
            ask(llama, tiny.live)
        monkeypatch.setattr(llama._ctx, "decode", decode)
        assert ask(llama, tiny.live) == answers[one,]


def test_a_cleared_kv_cache_is_not_taken_for_live_tokens(tiny, one, answers):
    llama = open_llama(tiny, one)
    for use in (lambda: ask(llama, tiny.live), lambda: llama.eval(tiny.live), llama.save_state):
        llama.eval(tiny.live)
        llama._ctx.kv_cache_clear()
        use()
        assert llama.n_tokens == llama_cpp.llama_memory_seq_pos_max(llama._ctx.memory, 0) + 1
        assert ask(llama, tiny.live) == answers[one,]


def test_attaching_clears_every_sequence(tiny, one, monkeypatch):
    params = llama_cpp.llama_context_default_params()
    params.n_seq_max, params.kv_unified = 2, True
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_context_default_params", lambda: params)
    llama = open_llama(tiny)
    llama.eval(tiny.live)
    llama._ctx.kv_cache_seq_cp(0, 1, 0, -1)

    def last_positions():
        return [llama_cpp.llama_memory_seq_pos_max(llama._ctx.memory, sequence) for sequence in range(2)]

    assert last_positions() == [len(tiny.live) - 1] * 2
    llama.attach(one)
    assert last_positions() == [-1, -1] and llama.n_tokens == 0


@pytest.mark.parametrize(
    "options", [{"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=4)}, {"logits_all": True}, {"n_batch": 7}]
)
def test_options_of_llama_change_no_answer(tiny, one, answers, options):
    llama = open_llama(tiny, one, **options)
    for _ in range(2):
        assert ask(llama, tiny.live) == answers[one,]
    llama.detach()
    assert ask(llama, tiny.live) == answers[()]
