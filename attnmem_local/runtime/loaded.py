"""A memory as one model has it loaded."""

import hashlib
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp._internals import LlamaModel

from ..engine import native
from ..memory.content import read_content
from ..memory.errors import BadInput, Invalid, MemoryRefused, Unreadable, Unsupported
from ..memory.memory import Memory
from ..memory.messages import parse_date, parse_messages, parse_tools
from ..memory.prefix import Prefix


class LoadedMemory:
    """A memory that is loaded for one model, valid as long as it is held and the model is open.

    source: the path of a file, or a Memory, which stays in RAM. A file is what it was when it was loaded: replacing,
        overwriting or deleting it changes nothing until it is loaded again. `path` is absolute, so that a later os.chdir
        changes nothing either; it is None for a memory in RAM.
    mapped: see read_content; a file that is overwritten in place then changes the memory.
    Raises MemoryRefused if the memory cannot be used with the model.
    """

    def __init__(self, model: LlamaModel, source: str | os.PathLike | Memory, mapped: bool = False):
        self._model = model
        self.path: Path | None = None
        self.version: tuple[int, ...] | None = None
        self.revision = 0  # how often rows were rewritten
        if isinstance(source, Memory):
            self._content = source.content()
        else:
            self.path = absolute(source)
            self.version = file_version(self.path)
            self._content = read_content(self.path, mapped)
            if file_version(self.path) != self.version:
                raise Unreadable(f"'{self.path}' changed while it was read; load it again once it is whole")
            self._real_path = os.path.realpath(self.path)  # of today: a symbolic link may lead elsewhere tomorrow
        self._fingerprint = self._hash() if mapped else None  # while the file is still what is loaded
        self._handle = native.init(model.model, self._content)
        weakref.finalize(self, _free, model, self._handle, self._content).atexit = False
        self.prefix_text = self.metadata("attnmem.prefix.text") or ""
        self.prefix_messages = self._parsed("attnmem.prefix.messages", parse_messages)
        self.prefix_tools = self._parsed("attnmem.prefix.tools", parse_tools)
        self.prefix_date = self._parsed("attnmem.prefix.date", parse_date)

    def __str__(self) -> str:
        return "the memory in RAM" if self.path is None else f"'{self.path}'"

    def _parsed(self, key: str, parse: Callable[[str], Any]) -> Any:
        text = self.metadata(key)
        try:
            return None if text is None else parse(text)
        except BadInput as error:
            raise Invalid(f"the key '{key}' of {self}: {error}") from None

    def __reduce__(self):
        raise TypeError("a LoadedMemory belongs to its model and is neither pickled nor copied; load its file again")

    @property
    def handle(self) -> int:
        if self._model.model is None:
            raise ValueError(f"{self} was freed with the model it was loaded for")
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

    def rewrite(self, segment: int, layer: int, kind: str, first: int, **tables: np.ndarray) -> None:
        """Overwrite rows of the tables of a memory in RAM, from row `first` on; no graph is rebuilt.

        tables: key, value, bias or lse of entries of a kind that have neither lists nor a graph, in the types that the
            tables have. A key and the bias that goes with it are rewritten together.
        Contexts that the memory is attached to forget their live tokens before they go on, as those were computed with
        the old rows. Raises MemoryRefused, changing nothing, for rows that are not there or not finite.
        """
        if self.path is not None:
            raise Unsupported(f"{self} stands for a file, whose rows stay; attach a Memory to rewrite its rows")
        for name, rows in tables.items():
            tensor = f"seg.{segment}.blk.{layer}.{kind}.{name}"
            before = self.fingerprint
            edit = f"{before} {tensor} {first} ".encode() + np.ascontiguousarray(rows).tobytes()
            self.revision += 1  # both before the rows change, so that an interrupt leaves no context that trusts old tokens
            self._fingerprint = hashlib.blake2b(edit).hexdigest()[:16]
            try:
                native.set_rows(self.handle, tensor, first, rows)
            except MemoryRefused:
                self._fingerprint = before
                raise

    @property
    def fingerprint(self) -> str:
        """Hash of the content that was loaded, whatever the file is now, and of the rows that were rewritten since."""
        if self._fingerprint is None:
            self._fingerprint = self._hash()
        return self._fingerprint

    def _hash(self) -> str:
        return hashlib.blake2b(self._content.data).hexdigest()[:16]

    def is_at(self, path: str | os.PathLike) -> bool:
        """Whether a path names the file: as it did when it was loaded, or now, through any link."""
        if self.path is None:
            return False
        path = absolute(path)
        if path == self.path or os.path.realpath(path) == self._real_path:
            return True
        try:
            return os.path.samefile(path, self.path)
        except OSError:  # one of them is gone
            return False

    def is_same(self, other: "LoadedMemory") -> bool:
        """Whether both are versions of one file, or have the same content, as a file that was moved has."""
        if self is other or (other.path is not None and self.is_at(other.path)):
            return True
        return np.size(self._content) == np.size(other._content) and self.fingerprint == other.fingerprint


def _free(model: LlamaModel, handle: int, content: np.ndarray) -> None:
    """The tables lie in the content, so it is held here until the native memory is gone."""
    if model.model is not None:  # else freed with the model
        native.free(handle)


def absolute(path: str | os.PathLike) -> Path:
    """Raises TypeError for what is not a path."""
    try:
        return Path(os.fsdecode(path)).absolute()
    except TypeError:
        raise TypeError(f"a memory is given by the path of its file, as a Memory or as a LoadedMemory; got {path!r}") from None


def file_version(path: Path) -> tuple[int, ...] | None:
    """What tells a file from the one that replaces it, even with the same modification time; None if it cannot be read."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
