"""Atomic file replacement: readers see the old file or the whole new one, even after a crash or with several writers."""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replace_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary file to write to, which replaces `path` on exit. If `path` is a link, its target is replaced.

    The old file stays until then, and for good if anything fails. Its permissions are kept; a file that did not exist gets the
    usual ones. Temporary files of writers that were killed are removed. Raises OSError if `path` cannot be written.
    """
    target = _target(path)
    _remove_leftovers(target)
    part, lock = _create(target)
    try:
        if target.exists():
            os.fchmod(lock, stat.S_IMODE(target.stat().st_mode))
        yield part
        _sync(part)
        os.replace(part, target)
        with contextlib.suppress(OSError):  # not every file system can sync a folder
            _sync(target.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)


def check_space(path: str | os.PathLike, nbytes: int) -> None:
    """Check, before long work, that replace_file could write nbytes to a path. Raises the OSError it would raise."""
    target = _target(path)
    try:
        with tempfile.TemporaryFile(dir=target.parent):  # permission bits do not reveal a read-only file system, an attempt does
            pass
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot write into the folder '{target.parent}': {error.strerror}; choose another --out"
        ) from None
    if (free := shutil.disk_usage(target.parent).free) < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"'{path}' needs {nbytes / 1e6:.1f} MB, but the disk has {free / 1e6:.1f} MB left; free some or choose another --out",
        )


def _target(path: str | os.PathLike) -> Path:
    """The file that a path names, links resolved. Raises OSError if it is not a regular file, or if its folder is missing."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the folder of '{path}' does not exist; create it or choose another --out")
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"'{path}' is a folder; name a file")
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, f"'{path}' is not a regular file, and would be replaced by one; name another file")
    return target


# A writer keeps its temporary file locked. One that can be locked was left behind by a writer that was killed.


def _stem(target: Path) -> str:
    """How the names of a target's temporary files begin."""
    return f".{target.name[:50]}."


def _create(target: Path) -> tuple[Path, int]:
    """A new, empty, locked file beside the target, and the descriptor that holds the lock."""
    while True:
        part = target.with_name(f"{_stem(target)}{secrets.token_hex(4)}.part")
        try:
            lock = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # the umask applies
        except FileExistsError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:  # else another writer removed it as a leftover before it was locked
            return part, lock
        os.close(lock)


def _remove_leftovers(target: Path) -> None:
    """Delete the target's temporary files that no living writer has locked."""
    for name in os.listdir(target.parent):
        if name.startswith(_stem(target)) and name.endswith(".part"):
            with contextlib.suppress(OSError):
                descriptor = os.open(target.with_name(name), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    target.with_name(name).unlink()
                finally:
                    os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
