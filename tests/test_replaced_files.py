"""Memory files that are replaced, linked, moved or damaged while a MemoryLlama uses them, and files that are no memories."""

import copy
import os
import pickle
import shutil
import sys
import weakref

import llama_cpp
import pytest
from helpers.answers import ask, open_llama

from attnmem_local.engine import native
from attnmem_local.memory import errors


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
    llama.attach("../soft")  # the link now leads to another file
    assert len(llama.memories) == 1 and ask(llama, tiny.live) == answers[two,]
    llama.detach()
    llama.attach(path)
    os.rename(path, "moved")
    llama.attach("moved")
    assert len(llama.memories) == 1
    with pytest.raises(ValueError, match="not attached"):
        llama.detach(tmp_path / "other")


@pytest.mark.parametrize("fate", ["replaced", "deleted", "truncated", "overwritten"])
def test_an_attached_memory_outlives_its_file(tiny, one, two, answers, tmp_path, fate):
    path = tmp_path / "memory.gguf"
    shutil.copy(one, path)
    llama = open_llama(tiny, path)
    llama.set_cache(llama_cpp.LlamaRAMCache())
    if fate == "replaced":
        os.replace(shutil.copy(two, tmp_path / "new"), path)
    elif fate == "deleted":
        path.unlink()
    elif fate == "truncated":
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
    if fate != "replaced":
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
    from attnmem_local.runtime import loaded

    def read_and_change(path, mapped):
        content = read_content(path, mapped)
        os.utime(path)
        return content

    read_content = loaded.read_content
    monkeypatch.setattr(loaded, "read_content", read_and_change)
    with pytest.raises(errors.Unreadable, match="changed while it was read"):
        open_llama(tiny).load_memory(shutil.copy(one, tmp_path / "memory.gguf"))


def rss() -> int:
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_updates_of_a_file_take_no_more_ram_than_one(tiny, one, tmp_path, monkeypatch):
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


def test_a_loaded_memory_stays_valid_while_it_is_held(tiny, one, two, answers, tmp_path):
    path = tmp_path / "memory.gguf"
    shutil.copy(one, path)
    llama = open_llama(tiny)
    old = llama.load_memory(path)
    assert llama.load_memory(path) is old
    shutil.copyfile(two, path)
    new = llama.attach(path)
    assert new is not old and old.fingerprint != new.fingerprint
    llama.attach(old)  # the version loaded first takes the place of the newer one
    assert [a.memory for a in llama.memories] == [old] and ask(llama, tiny.live) == answers[one,]
    llama.detach()
    gone = weakref.ref(new)
    del new
    assert gone() is None
    assert old.prefix_tokens == tiny.prefix.tokens
    llama.close()
    with pytest.raises(ValueError, match="freed with the model"):
        _ = old.prefix_tokens
    for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="load its file again"):
            duplicate(old)


def test_arguments_of_a_wrong_kind_are_refused(tiny, one, tmp_path):
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
