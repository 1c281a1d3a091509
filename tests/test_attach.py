"""What stays right while memories are attached, replaced, interrupted, copied and closed."""

import copy
import os
import pickle
import shutil
import sys
import weakref
from itertools import count

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from attnmem_local import errors, native
from attnmem_local.runtime import MemoryLlama

N_NEW = 12  # tokens of an answer


def open_llama(tiny, memory=None, **options):
    return MemoryLlama(str(tiny.path), memory=memory, verbose=False, **options)


def ask(llama, tokens, **options):
    return llama.create_completion(tokens, max_tokens=N_NEW, temperature=0, **options)["choices"][0]["text"]


def save(tiny, name, bias=0.0):
    """An exact memory, whose keys weigh more or less than those of the prefix."""
    memory = tiny.exact()
    for layer in memory.layers[0].values():
        layer.anchor.bias = layer.anchor.bias + np.float32(bias)
    return tiny.save(memory, name)


@pytest.fixture(scope="module")
def one(tiny):
    return save(tiny, "one")


@pytest.fixture(scope="module")
def two(tiny):
    return save(tiny, "two", bias=-1.0)


@pytest.fixture(scope="module")
def answers(tiny, one, two):
    """The answer of a fresh context by what is attached."""
    cases = {(): [], (one,): [one], (two,): [two], (one, two): [one, two]}
    res = {key: ask(open_llama(tiny, memory), tiny.live) for key, memory in cases.items()}
    assert len(set(res.values())) == len(res)
    return res


def answer_of(answers, llama):
    return answers[tuple(a.memory.path for a in llama.memories)]


# streams

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
    stream = llama.create_completion(tiny.prefix.tokens + tiny.live, stream=True)  # the prefix is left out now
    llama.detach()
    with pytest.raises(errors.StaleStream):
        next(stream)


def test_a_stream_goes_on_after_a_refused_attach_and_after_one_that_changes_nothing(tiny, one, answers):
    llama = open_llama(tiny, one)
    stream = llama.create_completion(tiny.live, max_tokens=N_NEW, temperature=0, stream=True)
    text = next(stream)["choices"][0]["text"]
    llama.attach(one)
    with pytest.raises(errors.Unreadable):
        llama.attach("missing")
    with pytest.raises(errors.Invalid):
        llama.attach(one, gain=np.nan)
    assert text + "".join(chunk["choices"][0]["text"] for chunk in stream) == answers[one,]


# interrupts


class Interrupt:
    """Raises KeyboardInterrupt at the nth line of what changes a context."""

    files = ("attachments.py", "native.py", "runtime.py")

    def __init__(self, n):
        self.n = n

    def __enter__(self):
        sys.settrace(self.trace)
        return self

    def __exit__(self, *error):
        sys.settrace(None)
        return error[0] is KeyboardInterrupt

    @staticmethod
    def now(*args):
        raise KeyboardInterrupt

    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.endswith(self.files) or frame.f_code.co_name == "free":  # Python ignores errors in finalizers
            return None
        if event == "line":
            self.n -= 1
            if self.n == 0:
                raise KeyboardInterrupt
        return self.trace


@pytest.mark.parametrize("change", ["attach", "detach", "lookup"])
def test_an_interrupted_change_never_mixes_memories(tiny, one, two, answers, change):
    llama = open_llama(tiny, one)
    interrupted = 0
    for n in count(1):
        llama.eval(tiny.live)  # live tokens to be reused by mistake
        with Interrupt(n) as interrupt:
            {
                "attach": lambda: llama.attach(two),
                "detach": lambda: llama.detach(one),
                "lookup": lambda: llama.set_lookup("stock" if llama.lookup == "auto" else "auto"),
            }[change]()
        if interrupt.n > 0:  # not reached: the change is whole
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
                raise KeyboardInterrupt  # where Ctrl-C during a decode arrives

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
    last = lambda: [llama_cpp.llama_memory_seq_pos_max(llama._ctx.memory, i) for i in range(2)]  # noqa: E731
    assert last() == [len(tiny.live) - 1] * 2
    llama.attach(one)
    assert last() == [-1, -1] and llama.n_tokens == 0


# files


def test_a_file_replaced_with_the_same_modification_time_is_loaded_again(tiny, one, two, answers, tmp_path):
    path = tmp_path / "memory.gguf"
    shutil.copy2(one, path)
    llama = open_llama(tiny, path)
    assert ask(llama, tiny.live) == answers[one,]
    old = llama.memories[0].memory
    before = path.stat()
    for replace in (shutil.copyfile, os.replace):  # in place and by rename
        new = shutil.copy2(two, tmp_path / "new")
        replace(new, path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert llama.attach(path) is not old and len(llama.memories) == 1
        assert ask(llama, tiny.live) == answers[two,]
        shutil.copyfile(one, path)
        llama.attach(path)


def test_a_file_is_attached_once_whatever_names_it(tiny, one, two, answers, tmp_path, monkeypatch):
    path = tmp_path / "memory.gguf"
    shutil.copy(one, path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    llama = open_llama(tiny, "memory.gguf")
    os.link(path, "hard")
    os.symlink(path, "soft")
    for name in ("memory.gguf", path, "elsewhere/../memory.gguf", "hard", "soft", os.fsencode(path)):
        llama.attach(name)
        assert len(llama.memories) == 1
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("../memory.gguf", path, "../hard", "../soft"):
        llama.attach(name)
        llama.detach("../memory.gguf")
        llama.attach("../memory.gguf")
        llama.detach(name)
        assert llama.memories == ()
    llama.attach("../soft")
    (tmp_path / "soft").unlink()
    os.symlink(two, tmp_path / "soft")
    llama.attach("../soft")  # now leads to another file
    assert len(llama.memories) == 1 and ask(llama, tiny.live) == answers[two,]
    llama.detach()
    llama.attach(path)
    os.rename(path, "moved")
    llama.attach("moved")
    assert len(llama.memories) == 1
    with pytest.raises(ValueError, match="not attached"):
        llama.detach(tmp_path / "other")


@pytest.mark.parametrize("what", ["replaced", "deleted", "truncated", "overwritten"])
def test_a_running_service_does_not_feel_that_its_file_is(tiny, one, two, answers, tmp_path, what):
    path = tmp_path / "memory.gguf"
    shutil.copy(one, path)
    llama = open_llama(tiny, path)
    llama.set_cache(llama_cpp.LlamaRAMCache())
    if what == "replaced":
        os.replace(shutil.copy(two, tmp_path / "new"), path)
    elif what == "deleted":
        path.unlink()
    elif what == "truncated":
        os.truncate(path, 0)
    else:
        path.write_bytes(os.urandom(path.stat().st_size))
    assert ask(llama, tiny.live) == answers[one,]
    state = llama.save_state()
    llama.reset()
    llama.load_state(state)
    assert ask(llama, tiny.live) == answers[one,]
    fresh = open_llama(tiny, one)
    fresh.load_state(state)
    if what != "replaced":
        with pytest.raises(errors.MemoryRefused):
            llama.attach(path)
    else:
        llama.attach(path)
        assert ask(llama, tiny.live) == answers[two,]


def test_a_mapped_memory_answers_the_same(tiny, one, two, answers, tmp_path):
    path = tmp_path / "memory.gguf"
    shutil.copy(one, path)
    llama = open_llama(tiny, path, memory_mmap=True)
    assert ask(llama, tiny.live) == answers[one,]
    fingerprint = open_llama(tiny, one).memories[0].memory.fingerprint
    os.replace(shutil.copy(two, tmp_path / "new"), path)
    assert llama.memories[0].memory.fingerprint == fingerprint
    assert ask(llama, tiny.live) == answers[one,]


def test_a_file_that_is_being_written_is_refused(tiny, one, tmp_path, monkeypatch):
    from attnmem_local import loaded

    def read_and_change(path, mapped):
        content = read_content(path, mapped)
        os.utime(path)
        return content

    read_content = loaded.read_content
    monkeypatch.setattr(loaded, "read_content", read_and_change)
    with pytest.raises(errors.Unreadable, match="changed while it was read"):
        open_llama(tiny).load_memory(shutil.copy(one, tmp_path / "memory.gguf"))


def rss():
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_updates_of_a_file_take_no_more_room_than_one(tiny, one, tmp_path, monkeypatch):
    path = tmp_path / "memory.gguf"
    shutil.copy(one, path)
    llama = open_llama(tiny)
    handles, init, free = set(), native.init, native.free
    monkeypatch.setattr(native, "init", lambda *args: handles.add(handle := init(*args)) or handle)
    monkeypatch.setattr(native, "free", lambda handle: handles.remove(handle) or free(handle))
    for i in range(100):
        os.replace(shutil.copy(one, tmp_path / "new"), path)
        llama.attach(path)
        assert len(handles) == 1
        if i == 10:
            settled, files = rss(), len(os.listdir("/proc/self/fd"))
    size = path.stat().st_size
    assert rss() - settled < 10 * size < 90 * size
    assert len(os.listdir("/proc/self/fd")) == files
    llama.detach()
    assert not handles


def test_a_loaded_memory_is_valid_as_long_as_it_is_held(tiny, one, two, answers, tmp_path):
    path = tmp_path / "memory.gguf"
    shutil.copy(one, path)
    llama = open_llama(tiny)
    old = llama.load_memory(path)
    assert llama.load_memory(path) is old
    shutil.copyfile(two, path)
    new = llama.attach(path)
    assert new is not old and old.fingerprint != new.fingerprint
    llama.attach(old)  # the version that was loaded first, in the place of the other
    assert [a.memory for a in llama.memories] == [old] and ask(llama, tiny.live) == answers[one,]
    llama.detach()
    gone = weakref.ref(new)
    del new
    assert gone() is None
    assert old.prefix_tokens == tiny.prefix.tokens
    llama.close()
    with pytest.raises(ValueError, match="freed with the model"):
        old.prefix_tokens
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="load its file again"):
            duplicate(old)


def test_what_cannot_be_a_memory_is_named(tiny, one, tmp_path):
    llama = open_llama(tiny)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, tmp_path / "missing", "nul\0", "", one / "below"):
        with pytest.raises(errors.Unreadable):
            llama.attach(path)
    for path in (5, None, 1.5, [one]):
        with pytest.raises(TypeError, match="path of its file"):
            llama.attach(path)
    for gain in ("x", "1", None, [0.0], 1j):
        with pytest.raises(TypeError, match="gain must be a number"):
            llama.attach(one, gain)
    for lookup in ("fast", None, ["scan"]):
        with pytest.raises(ValueError, match="lookup must be one of"):
            llama.set_lookup(lookup)
    with pytest.raises(TypeError, match="path of its file"):
        open_llama(tiny, 5)
    assert llama.memories == ()


def test_a_path_that_is_not_utf8(tiny, one, answers, tmp_path):
    name = os.fsencode(tmp_path) + b"/gr\xfc\xdfe.gguf"
    shutil.copyfile(one, name)
    llama = open_llama(tiny, name)
    assert ask(llama, tiny.live) == answers[one,]
    llama.attach(os.fsdecode(name), gain=-1.0)
    llama.detach(name)
    assert llama.memories == ()


# copies


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


# the end

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
    llama.load_state(plain.save_state())  # of a plain one, without memories


@pytest.mark.parametrize("how", ["damaged", "interrupted"])
def test_a_state_that_is_not_loaded_whole_leaves_no_tokens_behind(tiny, one, answers, monkeypatch, how):
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
            cache = llama.cache  # as one object's cache is handed to the next
            llama.reset()
            assert ask(llama, tiny.live) == answers[key]


@pytest.mark.parametrize("options", [{"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=4)}, {"logits_all": True}, {"n_batch": 7}])
def test_options_of_llama_change_no_answer(tiny, one, answers, options):
    llama = open_llama(tiny, one, **options)
    for _ in range(2):
        assert ask(llama, tiny.live) == answers[one,]
    llama.detach()
    assert ask(llama, tiny.live) == answers[()]
