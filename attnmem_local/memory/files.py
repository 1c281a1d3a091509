"""Writing a file so that it is there as a whole or not at all, whatever happens and whoever else writes it."""

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
    """Yields where to write the new content; at the end that takes the place of `path`, or of the file a link points to.

    Until then, and if anything fails, the old file stays. The permissions are those of the old file, or as for any new
    one. What is left by writers that were killed is removed. Raises OSError where `path` cannot be written.
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
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            _sync(target.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)


def check_space(path: str | os.PathLike, nbytes: int) -> None:
    """Raises the OSError that writing so many bytes to a path would end in, before the work: see replace_file."""
    target = _target(path)
    try:
        with tempfile.TemporaryFile(dir=target.parent):  # an attempt, as permissions do not tell of every file system
            pass
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot write into the folder '{target.parent}': {error.strerror}; choose another --out"
        ) from None
    if (free := shutil.disk_usage(target.parent).free) < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"'{path}' takes {nbytes / 1e6:.1f} MB, the disk has {free / 1e6:.1f} MB left; free some or choose another --out",
        )


def _target(path: str | os.PathLike) -> Path:
    """The file that is written for a path. Raises OSError if it is not one, or if its folder is missing."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"the folder of '{path}' does not exist")
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, f"'{path}' is a folder; name a file")
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, f"'{path}' is not a regular file, and would be replaced by one; name another file")
    return target


# A writer holds a lock on its temporary file, so that the file of a dead one can be told from that of a live one.


def _stem(target: Path) -> str:
    return f".{target.name[:50]}."


def _create(target: Path) -> tuple[Path, int]:
    """A new, empty file beside the target that no other writer knows, and the descriptor that its lock belongs to."""
    while True:
        part = target.with_name(f"{_stem(target)}{secrets.token_hex(4)}.part")
        try:
            lock = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # the umask applies
        except FileExistsError:
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:  # another writer may have taken it for a leftover before it was locked
            return part, lock
        os.close(lock)


def _remove_leftovers(target: Path) -> None:
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
