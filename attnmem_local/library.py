"""Models and memories by name: the folders they are kept in, and the file that a name stands for.

`handbook` is the file `handbook.mem.gguf` in the memories folder, `qwen` the file `qwen.gguf` in a models folder, and
`default` the default model. What ends in `.gguf` or has a folder in front is a path.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from .memory.errors import AttnmemError, BadInput, MemoryRefused, naming

HOME_VARIABLE = "ATTNMEM_HOME"  # moves the folder of models and memories
MEMORY_SUFFIX = ".mem.gguf"
MODEL_SUFFIX = ".gguf"
TOKENS_KEY, MODEL_KEY = "attnmem.prefix.tokens", "attnmem.build.model"  # of a memory file

_ROOT = Path(__file__).parents[1]
DEFAULT_MODEL = _ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"  # as build.sh fetches it into a checkout


class WrongKind(BadInput):
    """A file of another kind than the one that is needed: a memory in the place of a model, for example."""

    def __init__(self, path: Path, kind: str, expected: str):
        named = {"other": "not a GGUF file", "adapter": "an adapter of another kind"}.get(kind, f"a {kind}")
        super().__init__(f"'{path}' is {named}; a {expected} is needed here")
        self.kind = kind  # as file_kind names it


# Folders


def is_checkout() -> bool:
    """Whether the package runs from a checkout of its repository, as build.sh installs it."""
    return (_ROOT / "build.sh").is_file()


def checkout(purpose: str, path: str) -> Path:
    """The folder of the checkout that the package runs from. Raises BadInput if it lacks a file that the purpose needs."""
    if not (_ROOT / path).exists():
        raise BadInput(
            f"{purpose} needs '{path}' of the repository; run ./build.sh in a checkout of it, and use the attnmem of its .venv"
        )
    return _ROOT


def home() -> Path:
    """The folder that models and memories are kept in. Raises BadInput if the user has no home folder."""
    if folder := os.environ.get(HOME_VARIABLE):
        return Path(folder).expanduser().absolute()
    return _absolute(platformdirs.user_data_path("attnmem", appauthor=False), HOME_VARIABLE)


def cache_folder() -> Path:
    """The folder of what can be computed again. Raises BadInput if the user has no home folder."""
    return _absolute(platformdirs.user_cache_path("attnmem", appauthor=False), "XDG_CACHE_HOME")


def memories_folder() -> Path:
    return home() / "memories"


def models_folders() -> list[Path]:
    """Where models are looked for by name, in this order."""
    return [home() / "models", *([DEFAULT_MODEL.parent] if is_checkout() else [])]


def _absolute(path: Path, variable: str) -> Path:
    """platformdirs leaves a ~ in the path of a user without a home folder."""
    if not path.is_absolute():
        raise BadInput(f"this user has no home folder; set {variable} to a folder to use")
    return path


# Names


def find_model(name: str, folder: bool = False) -> Path:
    """The file of a model that is given by name or path; folder: a transformers directory will do, too.

    Raises BadInput if there is none, and WrongKind if it is not a model.
    """
    folders = models_folders()
    if name == "default":
        missing = f"the default model is not in {_listed(folders)}; run ./build.sh in a checkout to fetch it, or give another model"
        return _first([parent / DEFAULT_MODEL.name for parent in folders], "model", missing)
    return _first(_candidates(name, folders, MODEL_SUFFIX), "model", _missing("model", name, folders), folder)


def find_memory(name: str) -> Path:
    """The file of a memory that is given by name or path. Raises BadInput if there is none, and WrongKind if it is not a memory."""
    folders = [memories_folder()]
    return _first(_candidates(name, folders, MEMORY_SUFFIX), "memory", _missing("memory", name, folders))


def memory_path(name: str) -> Path:
    """Where a memory of this name or path is written. Raises BadInput if it is empty."""
    if not name:
        raise BadInput("the name of a memory is empty")
    return memories_folder() / f"{name}{MEMORY_SUFFIX}" if _is_name(name) else Path(name)


def memory_name(path: Path) -> str:
    """The shortest way to give a memory: its name if it is in the memories folder, else its path."""
    is_named = path.parent == memories_folder() and path.name.endswith(MEMORY_SUFFIX)
    return path.name.removesuffix(MEMORY_SUFFIX) if is_named else str(path)


def _is_name(name: str) -> bool:
    return Path(name).name == name and not name.endswith(MODEL_SUFFIX)


def _candidates(name: str, folders: Sequence[Path], suffix: str) -> list[Path]:
    """What a name or path may stand for, first choice first: a name means the same in every working directory."""
    if _is_name(name):
        return [*(folder / f"{name}{suffix}" for folder in folders), Path(name)]
    return [Path(name), *(folder / name for folder in folders if Path(name).name == name)]


def _missing(expected: str, name: str, folders: Sequence[Path]) -> str:
    if Path(name).name != name:
        return f"there is no {expected} at '{name}'"
    return f"there is no {expected} '{name}', neither here nor in {_listed(folders)}; `attnmem list` shows the names"


def _first(candidates: Sequence[Path], expected: str, missing: str, folder: bool = False) -> Path:
    """The first path that exists, if it is what was expected."""
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        raise BadInput(missing)
    if not (folder and path.is_dir()):
        _check_kind(path, expected)
    return path


def _check_kind(path: Path, expected: str) -> None:
    from .memory.filekind import file_kind

    if not path.is_file():
        raise BadInput(f"'{path}' is not a regular file; a {expected} is needed here")
    if (kind := file_kind(path)) not in (expected, "unknown"):
        raise WrongKind(path, kind, expected)


def _listed(folders: Sequence[Path]) -> str:
    return " or ".join(f"'{folder}'" for folder in folders)


# The model of a memory


def model_of(memories: Sequence[Path], folder: bool = False) -> Path:
    """The model that memories were built for: beside them, or in a models folder. Raises BadInput if that does not tell.

    folder: a transformers directory will do, too.
    """
    headers = {path: Header.read(path) for path in memories}
    named = {path: header.model for path, header in headers.items() if header.model}
    if not named:
        raise BadInput(f"'{memories[0]}' does not say which model it was built for; give the model by -m")
    (path, name), *others = named.items()
    for other, other_name in others:
        if other_name != name:
            raise BadInput(
                f"'{path}' was built for the model '{name}', '{other}' for '{other_name}': no model answers with both. "
                "Leave one out, or give a model that fits both by -m"
            )
    folders = [*dict.fromkeys(path.parent for path in memories), *models_folders()]
    missing = f"'{path}' was built for the model '{name}', which is not in {_listed(folders)}; give the model by -m"
    return _first([parent / name for parent in folders], "model", missing, folder)


def link_model(path: Path) -> None:
    """Let memories find a model by the name of its file, through a link in the models folder, unless that name is taken."""
    link = models_folders()[0] / path.name
    with suppress(OSError):  # a file system without links, or a folder that cannot be read: the user gives the model by -m
        if any((folder / path.name).exists() for folder in models_folders()):
            return
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():  # to a model that has moved
            link.unlink()
        link.symlink_to(path.resolve())


# What there is


@dataclass(frozen=True)
class Header:
    """What a memory file says about itself before its tables."""

    path: Path
    nbytes: int  # of the file
    n_prefix_tokens: int
    model: str | None  # file name of the model that it was built from; older files lack it

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Raises MemoryRefused, which names the file, for one that cannot be read."""
        import numpy as np

        from .memory.content import read_content
        from .memory.gguf_file import GGUFFile

        try:
            content = read_content(path, mapped=True)
            file = GGUFFile(content)
            file.read_keys()
        except MemoryRefused as error:
            raise naming(error, path) from None
        tokens, model = (value.value if (value := file.keys.get(key)) else None for key in (TOKENS_KEY, MODEL_KEY))
        is_file_name = isinstance(model, str) and model != ".." and Path(model).name == model  # an untrusted file may hold any path
        return cls(path, len(content), np.size(tokens) if tokens is not None else 0, str(model) if is_file_name else None)


def memories() -> Iterator[Header | AttnmemError]:
    """The memories of the memories folder, by name; for one that cannot be read what is wrong with it."""
    for path in sorted(memories_folder().glob(f"*{MEMORY_SUFFIX}")):
        try:
            yield Header.read(path)
        except MemoryRefused as error:
            yield error


def models() -> Iterator[Path]:
    """The models of the models folders, each folder by name. A name that an earlier folder has is not found in a later one."""
    seen: set[str] = set()
    for folder in models_folders():
        for path in sorted(folder.glob(f"*{MODEL_SUFFIX}")):
            if path.is_file() and not path.name.endswith(MEMORY_SUFFIX) and path.name not in seen:  # no link to one that has moved
                seen.add(path.name)
                yield path
