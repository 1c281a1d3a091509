"""A memory file as one model has it loaded."""

import hashlib
import os
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp._internals import LlamaModel

from ..engine import native
from ..memory.content import read_content
from ..memory.errors import BadInput, Invalid, Unreadable
from ..memory.messages import parse_date, parse_messages, parse_tools
from ..memory.prefix import Prefix


class LoadedMemory:
    """A memory that is loaded for one model, valid as long as it is held and the model is open.

    It is what the file was when it was loaded: replacing, overwriting or deleting the file changes nothing until it is
    loaded again. `path` is absolute, so that a later os.chdir changes nothing either.
    mapped: see read_content; a file that is overwritten in place then changes the memory.
    Raises MemoryRefused if the file cannot be used with the model.
    """

    def __init__(self, model: LlamaModel, path: str | os.PathLike, mapped: bool = False):
        self.path = absolute(path)
        self.version = file_version(self.path)
        self._model = model
        self._content = read_content(self.path, mapped)
        if file_version(self.path) != self.version:
            raise Unreadable(f"'{self.path}' changed while it was read; load it again once it is whole")
        self._real_path = os.path.realpath(self.path)  # of today: a symbolic link may lead elsewhere tomorrow
        if mapped:
            self.fingerprint  # computed while the file is still what is loaded
        self._handle = native.init(model.model, self._content)
        weakref.finalize(self, _free, model, self._handle, self._content).atexit = False
        self.prefix_text = self.metadata("attnmem.prefix.text") or ""
        self.prefix_messages = self._parsed("attnmem.prefix.messages", parse_messages)
        self.prefix_tools = self._parsed("attnmem.prefix.tools", parse_tools)
        self.prefix_date = self._parsed("attnmem.prefix.date", parse_date)

    def _parsed(self, key: str, parse: Callable[[str], Any]) -> Any:
        text = self.metadata(key)
        try:
            return None if text is None else parse(text)
        except BadInput as error:
            raise Invalid(f"the key '{key}' of '{self.path}': {error}") from None

    def __reduce__(self):
        raise TypeError("a LoadedMemory belongs to its model and is neither pickled nor copied; load its file again")

    @property
    def handle(self) -> int:
        if self._model.model is None:
            raise ValueError(f"'{self.path}' was freed with the model it was loaded for")
        return self._handle

    @property
    def prefix_tokens(self) -> list[int]:
        """The tokens that the memory stands for; not kept, as a list of them takes ten times their bytes."""
        return native.prefix_tokens(self.handle)

    @property
    def prefix(self) -> Prefix:
        return Prefix(self.prefix_tokens, self.prefix_text, self.prefix_messages, tools=self.prefix_tools, date=self.prefix_date)

    def metadata(self, key: str) -> str | None:
        """A scalar metadata value of the file as text, None if it has no such key."""
        return native.metadata(self.handle, key)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content that was loaded, whatever the file is now."""
        return hashlib.blake2b(self._content).hexdigest()[:16]

    def is_at(self, path: str | os.PathLike) -> bool:
        """Whether a path names the file: as it did when it was loaded, or now, through any link."""
        path = absolute(path)
        if path == self.path or os.path.realpath(path) == self._real_path:
            return True
        try:
            return os.path.samefile(path, self.path)
        except OSError:  # one of them is gone
            return False

    def is_same(self, other: "LoadedMemory") -> bool:
        """Whether both are versions of one file, or have the same content, as a file that was moved has."""
        return self.is_at(other.path) or (
            np.size(self._content) == np.size(other._content) and self.fingerprint == other.fingerprint
        )


def _free(model: LlamaModel, handle: int, content: np.ndarray) -> None:
    """The tables lie in the content, so it is held here until the native memory is gone."""
    if model.model is not None:  # else freed with the model
        native.free(handle)


def absolute(path: str | os.PathLike) -> Path:
    """Raises TypeError for what is not a path."""
    try:
        return Path(os.fsdecode(path)).absolute()
    except TypeError:
        raise TypeError(f"a memory is given by the path of its file, or as a LoadedMemory; got {path!r}") from None


def file_version(path: Path) -> tuple[int, ...] | None:
    """What tells a file from the one that replaces it, even with the same modification time; None if it cannot be read."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
