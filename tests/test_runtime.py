"""MemoryLlama from a user's view: attaching, combining memories, chat, streaming, caches, saved states, refusals."""

import copy

import llama_cpp
import numpy as np
import pytest

from attnmem_local.evaluate.scorer import Scorer, kl
from attnmem_local.memory import errors
from attnmem_local.memory.entries import LayerMemory
from attnmem_local.memory.format import MAX_SEGMENTS
from attnmem_local.prompt.prefix import chat_prefix
from attnmem_local.runtime.llama import MemoryLlama

SYSTEM = [{"role": "system", "content": "You are terse."}]


def part(memory, start, stop):
    """The exact memory of tokens start to stop of the prefix, at their positions in the whole prefix."""
    memory = copy.deepcopy(memory)
    n = len(memory.prefix_tokens)
    for il, layer in memory.layers[0].items():
        anchor = layer.anchor
        rows = np.concatenate([np.arange(h * n + start, h * n + stop) for h in range(memory.model.head_count_kv)])
        anchor.key, anchor.value, anchor.bias = anchor.key[rows], anchor.value[rows], anchor.bias[rows]
        anchor.offset = np.arange(memory.model.head_count_kv + 1, dtype=np.int32) * (stop - start)
        memory.layers[0][il] = LayerMemory(anchor=anchor)
    return memory


@pytest.fixture(scope="module")
def exact(tiny):
    return tiny.save(tiny.exact(), "exact")


@pytest.fixture(scope="module")
def full(tiny):
    return Scorer(tiny.path, tiny.prefix.tokens).log_probs(tiny.live)


@pytest.mark.parametrize("lookup", ["stock", "scan"])
def test_memories_of_parts_merge_to_the_whole(tiny, full, lookup):
    whole = tiny.exact()
    n = len(whole.prefix_tokens)
    paths = [tiny.save(part(whole, *span), f"part-{span[0]}") for span in ((0, 100), (100, 101), (101, n))]
    assert kl(full, Scorer(tiny.path, memory=paths, lookup=lookup).log_probs(tiny.live)).mean() < 1e-5
    assert kl(full, Scorer(tiny.path, memory=paths[:2], lookup=lookup).log_probs(tiny.live)).mean() > 1e-3


@pytest.mark.parametrize("lookup", ["stock", "scan"])
def test_segments_of_one_file_and_heads_of_different_size(tiny, full, lookup):
    whole = tiny.exact()
    n = len(whole.prefix_tokens)
    memory = copy.deepcopy(whole)
    memory.segment_offset = [0, 60, n]
    memory.layers = [part(whole, 0, 60).layers[0], part(whole, 60, n).layers[0]]
    # in layer 1, all keys of head 0 go to the first segment, so that the second has none
    first, second = (layers[1].anchor for layers in memory.layers)
    for name in ("key", "value", "bias"):
        a, b = getattr(first, name), getattr(second, name)
        setattr(first, name, np.concatenate((a[:60], b[: n - 60], a[60:])))
        setattr(second, name, b[n - 60 :])
    first.offset = np.array([0, n, n + 60], dtype=np.int32)
    second.offset = np.array([0, 0, n - 60], dtype=np.int32)
    path = tiny.save(memory, "segments")
    assert kl(full, Scorer(tiny.path, memory=path, lookup=lookup).log_probs(tiny.live)).mean() < 1e-5


def test_as_many_segments_as_a_file_may_have(tiny, full):
    memory = tiny.exact()
    for layer in memory.layers[0].values():
        layer.anchor.bias = layer.anchor.bias - np.log(MAX_SEGMENTS, dtype=np.float32)  # all copies together weigh as much as one
    memory.layers *= MAX_SEGMENTS
    memory.segment_offset = [0] * MAX_SEGMENTS + [len(memory.prefix_tokens)]
    path = tiny.save(memory, "many")
    for flash in (False, True):
        assert kl(full, Scorer(tiny.path, memory=path, flash_attn=flash).log_probs(tiny.live)).mean() < 1e-5


def test_gain(tiny, exact):
    none = Scorer(tiny.path).log_probs(tiny.live)
    for lookup in ("stock", "scan"):
        run = Scorer(tiny.path, lookup=lookup)
        run.llama.attach(exact, gain=-np.inf)
        assert kl(none, run.log_probs(tiny.live)).mean() < 1e-5  # −inf turns a memory off
        run.llama.attach(exact, gain=-1.0)
        weak = run.log_probs(tiny.live)
        run.llama.attach(exact, gain=0.0)
        strong = run.log_probs(tiny.live)
        assert kl(none, weak).mean() > 1e-3 and kl(strong, weak).mean() > 1e-3
        assert len(run.llama.memories) == 1
        for gain in (np.nan, np.inf, 1e39):
            with pytest.raises(errors.Invalid, match="gain"):
                run.llama.attach(exact, gain=gain)


def test_attaching_forgets_the_live_tokens(tiny, exact):
    llama = MemoryLlama(str(tiny.path), verbose=False)
    plain = llama.create_completion(tiny.live, max_tokens=12, temperature=0)["choices"][0]["text"]
    llama.attach(exact)
    with_memory = llama.create_completion(tiny.live, max_tokens=12, temperature=0)["choices"][0]["text"]
    fresh = MemoryLlama(str(tiny.path), memory=exact, verbose=False)
    assert with_memory == fresh.create_completion(tiny.live, max_tokens=12, temperature=0)["choices"][0]["text"] != plain
    llama.detach()
    assert llama.create_completion(tiny.live, max_tokens=12, temperature=0)["choices"][0]["text"] == plain


def test_a_memory_leaves_no_trace(tiny, exact):
    before = Scorer(tiny.path).logits(tiny.live)
    run = Scorer(tiny.path)
    run.llama.attach(exact)
    run.logits(tiny.live)
    run.llama.detach(exact)
    assert np.array_equal(run.logits(tiny.live), before)
    with pytest.raises(ValueError, match="not attached"):
        run.llama.detach(exact)


def chat_memory(tiny, name, messages=SYSTEM):
    prefix = chat_prefix(tiny.model.tokenizer, messages)
    memory = tiny.exact()
    memory.prefix_tokens, memory.prefix_text, memory.prefix_messages = prefix.tokens, prefix.text, messages
    memory.segment_offset = [0, len(prefix.tokens)]
    return tiny.save(memory, name)


def test_chat_never_feeds_the_prefix_twice(tiny):
    llama = MemoryLlama(str(tiny.path), memory=chat_memory(tiny, "chat"), verbose=False)
    user = [{"role": "user", "content": "Hi"}]
    live = tiny.model.tokenizer.render([*SYSTEM, *user], True)[len(llama.memories[0].memory.prefix_tokens) :]
    for messages in (user, [*SYSTEM, *user]):  # without and with the system message
        llama.reset()
        llama.create_chat_completion(messages, max_tokens=1, temperature=0)
        assert llama.input_ids[: len(live)].tolist() == live
    with pytest.raises(errors.PrefixMismatch, match="another one"):
        llama.create_chat_completion([{"role": "system", "content": "You are verbose."}, *user])


def test_chat_streams_and_goes_on(tiny):
    llama = MemoryLlama(str(tiny.path), memory=chat_memory(tiny, "chat"), verbose=False)
    user = [{"role": "user", "content": "Hi"}]
    whole = llama.create_chat_completion(user, max_tokens=8, temperature=0)["choices"][0]["message"]["content"]
    chunks = llama.create_chat_completion(user, max_tokens=8, temperature=0, stream=True)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == whole


def test_chat_needs_a_memory_of_a_chat(tiny, exact):
    llama = MemoryLlama(str(tiny.path), memory=exact, verbose=False)
    with pytest.raises(errors.MemoryRefused, match="plain text"):
        llama.create_chat_completion([{"role": "user", "content": "Hi"}])


def test_completion_drops_a_repeated_prefix(tiny, exact):
    llama = MemoryLlama(str(tiny.path), memory=exact, n_ctx=1024, verbose=False)
    llama.create_completion(tiny.prefix.tokens + tiny.live, max_tokens=1)
    assert llama.input_ids[: len(tiny.live)].tolist() == tiny.live


def test_saved_states_belong_to_their_memories(tiny, exact):
    llama = MemoryLlama(str(tiny.path), memory=exact, verbose=False)
    llama.eval(tiny.live)
    state = llama.save_state()
    llama.load_state(state)
    llama.detach()
    with pytest.raises(errors.MemoryRefused, match="other memories"):
        llama.load_state(state)


def test_prompt_caches_belong_to_their_memories(tiny, exact):
    llama = MemoryLlama(str(tiny.path), memory=exact, verbose=False)
    llama.set_cache(llama_cpp.LlamaRAMCache())
    llama.create_completion(tiny.live, max_tokens=4, temperature=0)
    assert tiny.live in llama.cache
    llama.detach()
    assert tiny.live not in llama.cache
    plain = MemoryLlama(str(tiny.path), verbose=False).create_completion(tiny.live, max_tokens=4, temperature=0)
    assert llama.create_completion(tiny.live, max_tokens=4, temperature=0)["choices"][0]["text"] == plain["choices"][0]["text"]


@pytest.mark.parametrize(
    "options, match",
    [
        ({"type_k": 8, "lookup": "stock"}, "quantized KV cache"),
        ({"embedding": True}, "embeddings"),
        ({"rope_freq_base": 5e5}, "RoPE base"),
    ],
)
def test_options_that_cannot_take_a_memory(tiny, exact, options, match):
    llama = MemoryLlama(str(tiny.path), verbose=False, **options)
    with pytest.raises(errors.Unsupported, match=match):
        llama.attach(exact)
    assert llama.memories == ()
    if "embedding" not in options:
        plain = MemoryLlama(str(tiny.path), verbose=False, **options)
        for context in (plain, llama):  # after the refusal, the context works as one without a memory
            context.reset()
            context.eval(tiny.live)
        with pytest.raises(errors.Unsupported):
            llama.attach(exact)
        a, b = (np.ctypeslib.as_array(c._ctx.get_logits_ith(-1), shape=(c.n_vocab(),)) for c in (plain, llama))
        assert np.array_equal(a, b)


def test_a_memory_belongs_to_the_model_it_was_loaded_for(tiny, exact):
    one, other = (MemoryLlama(str(tiny.path), verbose=False) for _ in range(2))
    loaded = one.load_memory(exact)
    with pytest.raises(errors.WrongModel, match="another model"):
        other.attach(loaded)
    one.attach(loaded)
    one.close()
    with pytest.raises(ValueError, match="freed"):
        loaded.metadata("general.type")
    with pytest.raises(ValueError, match="freed"):
        other.attach(loaded)


def test_a_rebuilt_file_replaces_the_old_memory(tiny):
    memory = tiny.exact()
    path = tiny.save(memory, "rebuilt")
    llama = MemoryLlama(str(tiny.path), memory=path, verbose=False)
    old = llama.memories[0].memory
    for layer in memory.layers[0].values():
        layer.anchor.bias -= 1
    memory.save(path)
    fingerprint = old.fingerprint
    new = llama.attach(path)
    assert new is not old and len(llama.memories) == 1
    assert old.fingerprint == fingerprint != new.fingerprint  # the old one still describes the loaded content, not the new file


def test_unknown_lookup(tiny):
    with pytest.raises(ValueError, match="lookup must be one of"):
        MemoryLlama(str(tiny.path), lookup="fast")
