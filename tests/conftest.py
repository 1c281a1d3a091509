"""Models and memories that several tests share; each is made once per run."""

from pathlib import Path

import pytest
import torch
from helpers.answers import ask, open_llama
from helpers.models import Tiny, save_exact
from helpers.paths import SERVER_README

from attnmem_local.builder.budget import uniform_plan
from attnmem_local.builder.capture import prefill
from attnmem_local.builder.fit import fit_memory
from attnmem_local.builder.job import Build, LiveText
from attnmem_local.builder.model import load_model
from attnmem_local.evaluate.dequantize import write_f32
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.prefix import Prefix


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """What tests measure and keep stays out of the user's folders; commands that tests run share it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ATTNMEM_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch on one thread: for a tiny model, threads that wait for each other take longer than the work."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope="session")
def default_model() -> Path:
    return DEFAULT_MODEL


@pytest.fixture(scope="session")
def f32_model(tmp_path_factory) -> Path:
    """The default model without quantization, on which exactness can be judged."""
    path = tmp_path_factory.mktemp("f32") / "default-f32.gguf"
    write_f32(DEFAULT_MODEL, path)
    yield path
    path.unlink()


@pytest.fixture(scope="session")
def default_build_model():
    return load_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def readme_tokens(default_build_model) -> list[int]:
    return default_build_model.tokenizer.encode(SERVER_README.read_text(encoding="utf-8"), add_bos=True)


@pytest.fixture(scope="session")
def real(default_build_model, readme_tokens, tmp_path_factory):
    """A memory of 1,024 real tokens on the default model: (path, memory, windows it was not built from)."""
    tokens, rest = readme_tokens[:1024], readme_tokens[1024:]
    windows = [rest[i : i + 256] for i in range(0, 12 * 256, 256)]
    kv = prefill(default_build_model, tokens)
    prefix = Prefix(tokens, default_build_model.tokenizer.decode(tokens))
    build = Build(default_build_model, prefix, kv=kv, text=LiveText(windows[2:]))
    memory = fit_memory(build, uniform_plan(default_build_model.spec, entries=1024))
    path = tmp_path_factory.mktemp("real") / "readme.mem.gguf"
    memory.save(path)
    return path, memory, windows[:2]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny32(tmp_path_factory) -> Tiny:
    """With heads wide enough for a block of Q8_0."""
    return Tiny(tmp_path_factory.mktemp("tiny32"), head_dim=32)


@pytest.fixture(scope="session")
def one(tiny) -> Path:
    return save_exact(tiny, "attached-one")


@pytest.fixture(scope="session")
def two(tiny) -> Path:
    return save_exact(tiny, "attached-two", bias=-1.0)


@pytest.fixture(scope="session")
def answers(tiny, one, two) -> dict[tuple[Path, ...], str]:
    """The answer of a fresh context to tiny.live, by what is attached."""
    res = {paths: ask(open_llama(tiny, paths), tiny.live) for paths in ((), (one,), (two,), (one, two))}
    assert len(set(res.values())) == len(res)
    return res
