"""Exact heads of long prefixes: tokens that are looked up."""

import numpy as np
import pytest

from attnmem_local.builder.budget import uniform_plan
from attnmem_local.builder.capture import capture, prefill
from attnmem_local.builder.entries import token
from attnmem_local.builder.entries.anchor import exact_anchors
from attnmem_local.builder.entries.head import join_heads
from attnmem_local.builder.fidelity import held_out_fidelity
from attnmem_local.builder.fit import fit_memory
from attnmem_local.builder.search.token_graph import token_graph
from attnmem_local.engine import native
from attnmem_local.evaluate.scorer import Scorer, kl
from attnmem_local.memory.entries import LayerMemory
from attnmem_local.memory.memory import Memory
from attnmem_local.runtime.llama import MemoryLlama

WINDOWS = np.random.default_rng(8).integers(300, 1024, (6, 64)).tolist()


@pytest.mark.slow
def test_exact_heads_of_long_prefixes_are_looked_up(tiny, monkeypatch):
    """The tokens with the largest logits are exact, and anchors stand for the rest."""
    monkeypatch.setattr(token, "LONG", 100)
    memory = fit_memory(tiny.build(WINDOWS), uniform_plan(tiny.model.spec, anchors=240))
    assert (memory.n_entries("token") == 240).all() and (memory.n_entries("anchor") == token.REST).all()
    result = held_out_fidelity(tiny.model, tiny.kv, memory, [tiny.live])
    assert result["kl_mean"] < 0.05 * result["kl_none"]
    path = tiny.save(memory, "token")
    exact = Scorer(tiny.path, tiny.prefix.tokens, n_live=len(tiny.live)).log_probs(tiny.live)
    for lookup in ("stock", "hnsw"):
        got = Scorer(tiny.path, memory=path, lookup=lookup).log_probs(tiny.live)
        assert kl(exact, got).mean() < 0.06 * result["kl_none"]


@pytest.mark.slow
def test_what_a_query_attends_is_found(default_build_model, default_model, readme_tokens, tmp_path):
    """Over links made from queries the search covers the mass of the true top k, for queries that made no links."""
    model, il, n = default_build_model, 7, 1024
    windows = [readme_tokens[i : i + 256] for i in range(n, n + 6 * 256, 256)]
    kv = prefill(model, readme_tokens[:n])
    q = capture(model, kv, windows[:-1])[il].q
    live = model.to_gguf_order(capture(model, kv, windows[-1:])[il].q).unflatten(1, (-1, 256))  # [n_head_kv, g, n_tokens, d_k]

    heads = [exact_anchors(k, v) for k, v in zip(kv.k[il], kv.v[il])]
    tokens = join_heads(heads, model.to_gguf_order)
    tokens.graph = token_graph([h.key.numpy() for h in heads], list(q.numpy()))
    path = tmp_path / "tokens.mem.gguf"
    layers = [{il: LayerMemory(token=tokens)}]
    Memory(model.spec, readme_tokens[:n], "", layers, [0, n], token_top_k=token.TOP_K).save(path)

    llama = MemoryLlama(str(default_model), memory=path, verbose=False)
    live = live.permute(2, 0, 1, 3).flatten(1, 2).contiguous().numpy()
    lse = [native.state(llama.memories[0].memory.handle, il, live, lookup)[..., -1] for lookup in ("hnsw", "scan")]
    mass = np.exp(lse[0] - lse[1])
    assert mass.mean() > 0.995 and np.quantile(mass, 0.05) > 0.98


def test_every_key_can_be_reached():
    """Also those that no query retrieves."""
    rng = np.random.default_rng(0)
    keys = [rng.standard_normal((n, 8)).astype(np.float32) for n in (0, 1, 400)]
    queries = [rng.standard_normal((3, 8)).astype(np.float32) for _ in keys]
    graph = token_graph(keys, queries)
    link = graph.link0[1:]
    reached = {int(graph.entry[2])}
    border = reached
    while border:
        border = {j for i in border for j in link[i].tolist() if j >= 0} - reached
        reached = reached | border
    assert len(reached) == 400
