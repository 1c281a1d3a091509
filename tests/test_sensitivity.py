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
    return sensitivity(tiny.build(WINDOWS)), cache_path(tiny.model)


def _first(value):
    def change(measured):
        measured = measured.clone()
        measured[0, 0, 0, 0] = value
        return measured

    return change


def _one_sided(measured):
    measured = measured.clone()
    measured[1, 1, 0, 1] *= 3
    return measured


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(torch.zeros_like, id="zeros"),
        pytest.param(lambda measured: measured.long(), id="integers"),
        pytest.param(lambda measured: measured[:2].contiguous(), id="another-model"),
        pytest.param(_first(torch.nan), id="nan"),
        pytest.param(_first(-1e-6), id="negative-diagonal"),
        pytest.param(_first(3e38), id="huge"),
        pytest.param(_one_sided, id="one-sided"),
    ],
)
def test_an_impossible_cache_is_measured_again(tiny, cached, caplog, damage):
    measured, path = cached
    save_file({"sensitivity": damage(measured)}, path)
    assert torch.equal(sensitivity(tiny.build(WINDOWS)), measured)
    assert [r.levelno for r in caplog.records] == [logging.WARNING] and str(path) in caplog.text
    assert torch.equal(sensitivity(tiny.build(WINDOWS[1:], seed=1)), measured)  # it is whole again
    assert len(caplog.records) == 1 and os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("place", ["empty", "half", "folder", "pipe", "link to nowhere"])
def test_a_damaged_cache_is_measured_again(tiny, cached, caplog, place):
    measured, path = cached
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
    assert torch.equal(sensitivity(tiny.build(WINDOWS)), measured)
    assert str(path) in caplog.text
    assert place in ("folder", "pipe") or path.read_bytes() == whole


def test_no_place_for_the_cache(tiny, cached, caplog, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert torch.equal(sensitivity(tiny.build(WINDOWS)), cached[0])
    assert "could not be cached" in caplog.text
