"""Which room of the package may import which."""

import ast
from pathlib import Path

import attnmem_local

HOUSE = Path(attnmem_local.__file__).parent
MAY_IMPORT = {  # what a room imports is in itself or in one of these
    "memory": set(),
    "prompt": {"memory"},
    "engine": {"memory"},
    "builder": {"memory", "prompt", "engine", "library"},
    "runtime": {"memory", "prompt", "engine"},
    "evaluate": {"memory", "prompt", "engine", "builder", "runtime"},
    "conversation": {"memory", "prompt", "engine", "runtime"},
    "library": {"memory"},
}
MEMORY_NEEDS = {"numpy", "gguf"}


def imports(path: Path):
    """Absolute names of the modules that a file imports, anywhere in it."""
    package = ("attnmem_local", *path.relative_to(HOUSE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_no_room_imports_one_that_it_must_not_know():
    wrong = []
    for room, others in MAY_IMPORT.items():
        for path in [HOUSE / f"{room}.py"] if (HOUSE / f"{room}.py").exists() else sorted((HOUSE / room).rglob("*.py")):
            for name in imports(path):
                if name.startswith("attnmem_local.") and name.split(".")[1] not in others | {room}:
                    wrong.append(f"{path.relative_to(HOUSE)} imports {name}")
    assert not wrong


def test_what_a_memory_is_needs_numpy_and_gguf_alone():
    import sys

    libraries = {name.split(".")[0] for path in (HOUSE / "memory").glob("*.py") for name in imports(path)}
    assert libraries - set(sys.stdlib_module_names) - {"attnmem_local"} == MEMORY_NEEDS
