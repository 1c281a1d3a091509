"""The cache of sensitivities: whatever lies in its place costs time and a warning, and nothing else."""

import logging
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attnmem_local.builder.sensitivity import cache_path, sensitivity

WINDOWS = np.random.default_rng(8).integers(300, 1024, (2, 12)).tolist()


@pytest.fixture
def cached(tiny, tmp_path, monkeypatch):
    """The sensitivity of a model, and the file that keeps it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return sensitivity(tiny.model, tiny.kv, WINDOWS, seed=0), cache_path(tiny.model)


def _first(value):
    def change(found):
        found = found.clone()
        found[0, 0, 0, 0] = value
        return found

    return change


def _one_sided(found):
    found = found.clone()
    found[1, 1, 0, 1] *= 3
    return found


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(torch.zeros_like, id="zeros"),
        pytest.param(lambda found: found.long(), id="integers"),
        pytest.param(lambda found: found[:2].contiguous(), id="another-model"),
        pytest.param(_first(torch.nan), id="nan"),
        pytest.param(_first(-1e-6), id="negative-diagonal"),
        pytest.param(_first(3e38), id="huge"),
        pytest.param(_one_sided, id="one-sided"),
    ],
)
def test_an_impossible_cache_is_measured_again(tiny, cached, caplog, damage):
    found, path = cached
    save_file({"sensitivity": damage(found)}, path)
    assert torch.equal(sensitivity(tiny.model, tiny.kv, WINDOWS, seed=0), found)
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and str(path) in caplog.text
    assert torch.equal(sensitivity(tiny.model, tiny.kv, WINDOWS[1:], seed=1), found)  # it is whole again
    assert len(caplog.records) == 1 and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("place", ["empty", "half", "folder", "pipe", "link to nowhere"])
def test_a_damaged_cache_is_measured_again(tiny, cached, caplog, place):
    found, path = cached
    whole = path.read_bytes()
    path.unlink()
    match place:
        case "empty":
            path.touch()
        case "half":
            path.write_bytes(whole[: len(whole) // 2])
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case _:
            path.symlink_to("nowhere")
    assert torch.equal(sensitivity(tiny.model, tiny.kv, WINDOWS, seed=0), found)
    assert str(path) in caplog.text
    assert place in ("folder", "pipe") or path.read_bytes() == whole


def test_no_place_for_the_cache(tiny, cached, caplog, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert torch.equal(sensitivity(tiny.model, tiny.kv, WINDOWS, seed=0), cached[0])
    assert "could not be cached" in caplog.text
