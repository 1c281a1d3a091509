"""A memory loaded for one model."""

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
from ..memory.errors import BadInput, Invalid, Unreadable, Unsupported
from ..memory.memory import Memory
from ..memory.messages import parse_date, parse_messages, parse_tools
from ..memory.prefix import Prefix


class LoadedMemory:
    """A memory loaded for one model. It stays valid while this object lives and the model is open.

    source: the path of a file, or a Memory in RAM. The content of a file is that of the time of loading: replacing,
        overwriting or deleting the file has no effect until it is loaded again. `path` is absolute, so that os.chdir has no
        effect either; it is None for a memory in RAM.
    mapped: see read_content; overwriting the file in place then does change the memory.
    Raises MemoryRefused if the memory cannot be used with the model.
    """

    def __init__(self, model: LlamaModel, source: str | os.PathLike | Memory, mapped: bool = False):
        self._model = model
        self.path: Path | None = None
        self.version: tuple[int, ...] | None = None
        self.revision = 0  # number of times that rows were rewritten
        if isinstance(source, Memory):
            self._content = source.content()
        else:
            self.path = absolute(source)
            self.version = file_version(self.path)
            self._content = read_content(self.path, mapped)
            if file_version(self.path) != self.version:
                raise Unreadable(f"'{self.path}' changed while it was read; load it again once it is whole")
            self._real_path = os.path.realpath(self.path)  # resolved now, as a symbolic link may be changed later
        self._fingerprint = self._hash() if mapped else None  # hashed now, as a mapped file may be changed later
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
            raise Invalid(f"the key '{key}' of {self} is invalid: {error}") from None

    def __reduce__(self):
        raise TypeError("a LoadedMemory belongs to its model and is neither pickled nor copied; load its file again")

    @property
    def handle(self) -> int:
        """The native llama_adapter_mem. Raises ValueError once the model is closed."""
        if self._model.model is None:
            raise ValueError(f"{self} was freed with the model it was loaded for; load it again for another model")
        return self._handle

    @property
    def prefix_tokens(self) -> list[int]:
        """The tokens of the prefix, copied from the native memory."""
        return native.prefix_tokens(self.handle)

    @property
    def prefix(self) -> Prefix:
        return Prefix(self.prefix_tokens, self.prefix_text, self.prefix_messages, tools=self.prefix_tools, date=self.prefix_date)

    def metadata(self, key: str) -> str | None:
        """A scalar metadata value of the memory as text, None if it has no such key."""
        return native.metadata(self.handle, key)

    def rewrite(self, segment: int, layer: int, kind: str, first: int, **tables: np.ndarray) -> None:
        """Overwrite rows in tables of a memory in RAM, from row `first` on, without rebuilding a compute graph.

        tables: new rows of key, value, bias or lse, by name and in the type of the table. The entries must have neither lists
            nor a search graph. Rewrite a key together with its bias.
        Contexts to which the memory is attached drop their live tokens before their next use, because those were computed with
        the old rows. Raises MemoryRefused, leaving the table unchanged, for rows that do not exist or are not finite.
        """
        if self.path is not None:
            raise Unsupported(f"{self} stands for a file, whose rows cannot be rewritten; attach a Memory instead")
        for name, rows in tables.items():
            tensor = f"seg.{segment}.blk.{layer}.{kind}.{name}"
            before = self.fingerprint
            edit = f"{before} {tensor} {first} ".encode() + np.ascontiguousarray(rows).tobytes()
            # revision and fingerprint change first, so that after an interrupt no context trusts its old live tokens
            self.revision += 1
            self._fingerprint = hashlib.blake2b(edit).hexdigest()[:16]
            try:
                native.set_rows(self.handle, tensor, first, rows)
            except Exception:  # of a refusal; an interrupt may have come after the rows changed
                self._fingerprint = before
                raise

    @property
    def fingerprint(self) -> str:
        """Hash of the loaded content, whatever the file contains now, and of all rows rewritten since."""
        if self._fingerprint is None:
            self._fingerprint = self._hash()
        return self._fingerprint

    def _hash(self) -> str:
        return hashlib.blake2b(self._content.data).hexdigest()[:16]

    def is_at(self, path: str | os.PathLike) -> bool:
        """Whether a path names the file, now or at the time of loading, directly or through links."""
        if self.path is None:
            return False
        path = absolute(path)
        if path == self.path or os.path.realpath(path) == self._real_path:
            return True
        try:
            return os.path.samefile(path, self.path)
        except OSError:  # one of the two files is gone
            return False

    def is_same(self, other: "LoadedMemory") -> bool:
        """Whether both are versions of one file, or have equal content, as after a file was moved."""
        if self is other or (other.path is not None and self.is_at(other.path)):
            return True
        return np.size(self._content) == np.size(other._content) and self.fingerprint == other.fingerprint


def _free(model: LlamaModel, handle: int, content: np.ndarray) -> None:
    """Free the native memory. content: the bytes its tables lie in, passed to keep them alive until then."""
    if model.model is not None:  # a closed model has freed its memories already
        native.free(handle)


def absolute(path: str | os.PathLike) -> Path:
    """The absolute path. Raises TypeError if it is not a path."""
    try:
        return Path(os.fsdecode(path)).absolute()
    except TypeError:
        raise TypeError(f"a memory is the path of its file, a Memory or a LoadedMemory, not {path!r}") from None


def file_version(path: Path) -> tuple[int, ...] | None:
    """Numbers that differ between a file and its replacement, even with equal modification times; None if it cannot be read."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: the path contains a NUL
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
