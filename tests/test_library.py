"""Models and memories by name, and the package away from its checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.paths import ROOT
from test_house import imports

from attnmem_local import library
from attnmem_local.cli import main
from attnmem_local.library import Header, find_memory, find_model, link_model, memory_name, memory_path, model_of
from attnmem_local.memory.errors import BadInput, MemoryRefused


def test_it_needs_no_model_to_run():
    libraries = {name.split(".")[0] for name in imports(Path(library.__file__))}
    assert libraries - set(sys.stdlib_module_names) == {"attnmem_local", "numpy", "platformdirs"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A library of one model, and an empty working directory."""
    monkeypatch.setenv("ATTNMEM_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in ("models", "memories"):
        (tmp_path / "home" / folder).mkdir(parents=True)
    return tmp_path / "home"


@pytest.fixture
def save(tiny, home):
    """Writes a memory that names a model, and gives its path."""

    def save(path: str, model: str | None = "tiny.gguf") -> Path:
        memory = tiny.exact()
        memory.build = {} if model is None else {"model": model}
        memory.save(memory_path(path))
        return memory_path(path)

    return save


def test_a_name_is_a_file_of_the_library_wherever_one_is(save, home):
    kept = save("handbook")
    assert kept == home / "memories/handbook.mem.gguf"
    Path("handbook").write_text("notes")  # in the working directory
    assert find_memory("handbook") == kept and memory_name(kept) == "handbook"
    assert find_memory("handbook.mem.gguf") == kept  # no such file here


def test_a_path_is_a_path(save):
    save("handbook")
    here = save("./handbook.mem.gguf")
    assert find_memory("handbook.mem.gguf") == find_memory("./handbook.mem.gguf") == here
    assert memory_name(here) == "handbook.mem.gguf"
    assert memory_path("folder/x") == Path("folder/x") and memory_path("x.gguf") == Path("x.gguf")


def test_a_model_by_name(tiny, home, monkeypatch):
    (home / "models/tiny.gguf").symlink_to(tiny.path)
    assert find_model("tiny") == find_model("tiny.gguf") == home / "models/tiny.gguf"
    assert find_model("default") == library.DEFAULT_MODEL
    copy = home / "models" / library.DEFAULT_MODEL.name
    copy.symlink_to(tiny.path)
    assert find_model("default") == copy  # the library comes before the checkout
    copy.unlink()
    monkeypatch.setattr(library, "is_checkout", lambda: False)
    with pytest.raises(BadInput, match=r"default model is not in .*build\.sh"):
        find_model("default")
    Path("transformers").mkdir()
    assert find_model("transformers", folder=True) == Path("transformers")


@pytest.mark.parametrize(
    "find, name, says",
    [
        (find_memory, "nothing", "there is no memory 'nothing', neither here nor in .*memories.*attnmem list"),
        (find_memory, "./nothing", "there is no memory at './nothing'"),
        (find_memory, "", "not a regular file; a memory is needed here"),
        (find_memory, "folder", "not a regular file"),
        (find_memory, "text.gguf", "not a GGUF file; a memory is needed here"),
        (find_model, "handbook.mem.gguf", "is a memory; a model is needed here"),
        (find_model, "nothing", "there is no model 'nothing'"),
        (find_model, "folder", "not a regular file"),
        (memory_path, "", "is empty"),
    ],
)
def test_what_no_name_stands_for(save, find, name, says):
    save("./handbook.mem.gguf")
    Path("text.gguf").write_text("text")
    Path("folder").mkdir()
    with pytest.raises(BadInput, match=says):
        find(name)


def test_a_memory_leads_to_its_model(tiny, save, home):
    memory, other = save("handbook"), save("./other.mem.gguf")
    with pytest.raises(BadInput, match=r"the model 'tiny\.gguf', which is not in .*models.*-m"):
        model_of([memory])
    (home / "models/tiny.gguf").symlink_to(tiny.path)
    assert model_of([memory]) == model_of([other, memory]) == home / "models/tiny.gguf"
    Path("tiny.gguf").symlink_to(tiny.path)
    assert model_of([other]) == Path("tiny.gguf")  # beside the memory


def test_memories_that_lead_nowhere(tiny, save, home):
    (home / "models/tiny.gguf").symlink_to(tiny.path)
    old, memory, other = save("old", model=None), save("handbook"), save("other", model="qwen.gguf")
    with pytest.raises(BadInput, match="does not say which model.*-m"):
        model_of([old])
    with pytest.raises(BadInput, match=r"'tiny\.gguf', .* for 'qwen\.gguf'"):
        model_of([memory, other])
    assert model_of([old, memory]).name == "tiny.gguf"
    for path in (str(tiny.path), "../tiny.gguf", "..", ""):  # a file that is not trusted names no path
        with pytest.raises(BadInput, match="does not say"):
            model_of([save("evil", model=path)])


def test_a_model_that_was_built_from_is_found_by_its_name(tiny, home):
    (home / "models" / tiny.path.name).symlink_to("moved")
    link_model(tiny.path)
    assert find_model(tiny.path.name).samefile(tiny.path)
    Path(tiny.path.name).write_bytes(tiny.path.read_bytes())
    link_model(Path(tiny.path.name))
    assert find_model(str(home / "models" / tiny.path.name)).samefile(tiny.path)  # the name stays taken


def test_what_is_there(tiny, save, home):
    path = save("handbook")
    (home / "memories/broken.mem.gguf").write_bytes(path.read_bytes()[:100])
    broken, whole = library.memories()
    assert isinstance(broken, MemoryRefused) and "broken.mem.gguf" in str(broken)
    assert whole == Header(path, path.stat().st_size, len(tiny.prefix.tokens), "tiny.gguf")
    save(str(home / "models/stray.mem.gguf"))
    link_model(tiny.path)
    assert [p.name for p in library.models()] == [tiny.path.name, library.DEFAULT_MODEL.name]


def test_a_user_without_a_home_folder(monkeypatch):
    monkeypatch.delenv("ATTNMEM_HOME")
    monkeypatch.setattr("platformdirs.user_data_path", lambda *_, **__: Path("~/.local/share/attnmem"))
    with pytest.raises(BadInput, match="set ATTNMEM_HOME"):
        library.home()


@pytest.mark.slow
def test_the_package_works_away_from_its_checkout(tiny, tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"  # pip leaves a build folder behind
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "attnmem_local"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([*pip, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    memory = tiny.save(tiny.exact(), "away")

    def attnmem(*args):
        program = "import attnmem_local.cli as cli; assert 'installed' in cli.__file__; cli.main()"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "ATTNMEM_HOME": str(tmp_path / "home")}
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, args)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    assert "Usage: " in attnmem("--help").stdout
    done = attnmem("run", "-m", tiny.path, "-M", memory, "-n", "3", "-t", "1", "Hi")
    assert done.returncode == 0 and done.stdout, done.stderr
    demo = attnmem("demo")
    assert demo.returncode == 1 and "in a checkout" in demo.stderr and "Traceback" not in demo.stderr


def test_a_link_to_a_model_that_has_moved_is_no_model(home):
    (home / "models" / "gone.gguf").symlink_to(home / "elsewhere.gguf")
    assert "gone.gguf" not in [path.name for path in library.models()]
    result = CliRunner().invoke(main, ["list"])
    assert result.exit_code == 0 and "gone" not in result.output
