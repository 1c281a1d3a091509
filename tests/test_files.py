"""Files are written completely or not at all, whoever else writes them at the same time."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from attnmem_local.memory.files import check_space, replace_file
from attnmem_local.memory.memory import Memory


def save(path: Path, text: str) -> None:
    with replace_file(path) as part:
        part.write_text(text)


PRELUDE = """
import sys
from attnmem_local.memory.files import replace_file
def wait():
    print("waits", flush=True)
    sys.stdin.readline()
"""


def program(code: str, *arguments) -> subprocess.Popen:
    """A Python process in which wait() prints "waits" and then blocks until it gets a line of input."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


HALF = """
with replace_file(sys.argv[1]) as part, open(part, "w") as f:
    f.write("half"); f.flush()
    wait()
    f.write(" and half")
"""


def test_two_builds_of_one_file_both_succeed_and_leave_one_whole_file(tmp_path):
    path = tmp_path / "out"
    first = program(HALF, path)
    assert first.stdout.readline() == "waits\n"
    save(path, "second")
    assert path.read_text() == "second"
    first.communicate("\n")
    assert first.returncode == 0
    assert path.read_text() == "half and half"
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_a_killed_build_are_removed_by_the_next_one(tmp_path):
    path = tmp_path / "out"
    save(path, "old")
    killed = program(HALF, path)
    killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(os.listdir(tmp_path)) == 2 and path.read_text() == "old"
    save(path, "new")
    assert os.listdir(tmp_path) == ["out"] and path.read_text() == "new"


def test_an_interrupted_build_keeps_the_old_file(tmp_path):
    path = tmp_path / "out"
    save(path, "old")
    with pytest.raises(KeyboardInterrupt), replace_file(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["out"] and path.read_text() == "old"


def test_a_new_file_follows_the_umask_and_a_replaced_one_keeps_its_permissions(tmp_path):
    path = tmp_path / "out"
    before = os.umask(0o027)
    try:
        save(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        save(path, "newer")
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_only_a_regular_file_is_replaced(tmp_path, kind):
    path = tmp_path / "out"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/null")
    for write in (lambda: save(path, "new"), lambda: check_space(path, 0)):
        with pytest.raises(OSError, match="is not a regular file|is a folder"):
            write()
    assert not path.is_file()


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "store").mkdir()
    link, target = tmp_path / "link", tmp_path / "store" / "target"
    target.write_text("old")
    link.symlink_to(target)
    save(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    assert os.listdir(target.parent) == ["target"]


def test_a_planted_link_is_not_followed(tmp_path):
    """In a shared folder somebody else may have created files with the names of temporary ones."""
    victim, path = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    (tmp_path / "out.part").symlink_to(victim)
    (tmp_path / ".out.00000000.part").symlink_to(victim)
    save(path, "new")
    assert victim.read_text() == "precious" and not path.is_symlink() and path.read_text() == "new"


def test_long_names_can_be_written(tmp_path):
    path = tmp_path / ("ü" * 120 + ".mem.gguf")
    save(path, "new")
    assert path.read_text() == "new"


def test_a_full_disk_says_so_with_its_error_number(tiny, monkeypatch):
    monkeypatch.setattr("attnmem_local.memory.files.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="the disk has 0.0 MB left") as caught:
        tiny.exact().save(tiny.folder / "full.mem.gguf")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tiny.folder.glob("*full*"))


def test_fidelity_that_could_not_be_measured_is_left_out(tiny):
    """A single token of live text has no NLL, and a file with NaN would be refused."""
    memory = tiny.exact()
    memory.fidelity = {"kl_mean": 0.1, "nll_full": np.nan}
    assert Memory.load(tiny.save(memory, "unmeasured")).fidelity == {}
