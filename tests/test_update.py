"""Memories of several parts, and changing one of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.mixed import mixed_memory, random_queries

from attnmem_local.builder.build import build_memory
from attnmem_local.builder.capture import prefill
from attnmem_local.builder.fidelity import held_out_fidelity
from attnmem_local.builder.update import _moved, unchanged, update_memory
from attnmem_local.memory.errors import WrongModel
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.prefix import Prefix
from attnmem_local.memory.tables import rows
from attnmem_local.prompt.prefix import held_back, read_prefix

PARTS = ("Our shop sells tea. Green tea costs 4 euros.\n", "We open at nine.\n", "Black tea costs 3 euros, and milk is free.\n")


def write(folder, *parts):
    paths = [folder / f"{i}.md" for i in range(len(parts))]
    for path, part in zip(paths, parts):
        path.write_text(part)
    return paths


@pytest.mark.parametrize("system", [False, True])
def test_parts_are_segments(tiny, tmp_path, system):
    prefix = read_prefix(tiny.model.tokenizer, write(tmp_path, *PARTS), system)
    texts = [tiny.model.tokenizer.decode(prefix.tokens[a:b]) for a, b in zip(prefix.offset, prefix.offset[1:])]
    texts[-1] += tiny.model.tokenizer.decode(held_back(tiny.model.tokenizer, prefix))
    assert len(texts) == 3 and texts[1] == PARTS[1] and texts[2].startswith(PARTS[2])
    assert texts[0].endswith(PARTS[0]) and "".join(texts) == prefix.text
    with pytest.raises(ValueError, match="empty"):
        read_prefix(tiny.model.tokenizer, write(tmp_path, PARTS[0], "", PARTS[1]), system)


def test_unchanged_segments_are_found(tiny):
    memory = tiny.exact()
    memory.prefix_tokens, memory.segment_offset = [1, 2, 3, 4, 5, 6], [0, 2, 3, 6]
    assert unchanged(memory, Prefix([1, 2, 9, 9, 4, 5, 6], "", None, [0, 2, 4, 7])) == {0: 0, 2: 2}
    assert unchanged(memory, Prefix([3, 4, 5, 6], "", None, [0, 1, 4])) == {0: 1, 1: 2}


def test_an_update_is_exact_where_its_bytes_allow(tiny, tmp_path):
    """All keys kept as anchors, the last part replaced by a longer one: kept keys must have moved to their new places."""
    model = tiny.model
    old = build_memory(model, write(tmp_path, *PARTS[:2]), share=1.1, queries=["repeat"])
    prefix = read_prefix(model.tokenizer, write(tmp_path, PARTS[0], PARTS[2]))
    new = update_memory(old, model, prefix, queries=["repeat"])
    assert new.segment_offset == prefix.offset and len(new.layers) == 2
    result = held_out_fidelity(model, prefill(model, prefix.tokens), new, [tiny.live])
    assert result["kl_mean"] < 1e-5 < 1e-2 < result["kl_none"]

    with pytest.raises(ValueError, match="no part"):
        update_memory(new, model, prefix, queries=["repeat"])
    new.model = replace(new.model, fingerprint_norms="0" * 16)
    with pytest.raises(WrongModel):
        update_memory(new, model, prefix, queries=["repeat"])


def test_lists_move_with_their_entries(tiny32):
    """Keys and lists score a query that moved along as they scored it before."""
    model = tiny32.model
    q = torch.from_numpy(random_queries(np.random.default_rng(2), 50, 32))
    layer = mixed_memory(model.spec, tiny32.prefix, q8_0=False).layers[0][1]
    moved = _moved(model, layer, -37)
    q_moved = model.to_gguf_order(model.rotate(model.from_gguf_order(q), -37)).numpy()
    for kind in ("centroid", "tangent", "residual"):
        before, after = getattr(layer, kind), getattr(moved, kind)
        for a, b, atol in (
            (before.key, after.key, 0.05),
            (before.lists.key, after.lists.key, 1),
        ):  # of up to 500; lists are in 8 bits
            np.testing.assert_allclose(q_moved @ rows(b).T, q.numpy() @ rows(a).T, atol=atol)


def test_a_model_is_known_again_from_the_file(tiny, tmp_path):
    """Also where the scale is not a number of float32, as with heads of 80 or 128."""
    memory = tiny.exact()
    memory.model = replace(memory.model, scale=80**-0.5, rope_freq_scale=1 / 3)
    memory.save(tmp_path / "a.gguf")
    assert Memory.load(tmp_path / "a.gguf").model == memory.model == replace(tiny.model.spec, scale=80**-0.5, rope_freq_scale=1 / 3)


def test_a_part_can_be_left_out(tiny, tmp_path):
    old = build_memory(tiny.model, write(tmp_path, *PARTS[:2]), share=1.1, queries=["repeat"])
    prefix = read_prefix(tiny.model.tokenizer, write(tmp_path, PARTS[0]))
    new = update_memory(old, tiny.model, prefix, queries=["repeat"])
    result = held_out_fidelity(tiny.model, prefill(tiny.model, prefix.tokens), new, [tiny.live])
    assert result["kl_mean"] < 1e-5
