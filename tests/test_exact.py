"""The exact memory (every key and value of the prefix an anchor) equals the prefix. If this fails, nothing else matters."""

import pytest

from attnmem_local.evaluate.exactness import exactness
from attnmem_local.evaluate.scorer import Scorer, kl


@pytest.mark.slow
def test_exact_memory_of_a_real_prefix(f32_model, readme_tokens):
    result = exactness(f32_model, readme_tokens[:1000], readme_tokens[1000:1256])
    assert result["kl_builder"] < 1e-5
    assert result["kl_runtime"] < 1e-5
    assert result["greedy_equal"]


# llama interleaves RoPE pairs in GGUF, the others do not; qwen2 has biases, qwen3 norms on q and k
@pytest.mark.parametrize("architecture, head_dim", [("llama", 16), ("qwen2", 16), ("qwen3", 128)])
def test_exact_memory_of_each_layout(architecture, head_dim, tmp_path):
    from helpers.models import Tiny

    tiny = Tiny(tmp_path, architecture, head_dim)
    full = Scorer(tiny.path, tiny.prefix.tokens).log_probs(tiny.live)
    none = Scorer(tiny.path).log_probs(tiny.live)
    assert kl(full, none).mean() > 0.05  # the prefix matters
    result = exactness(tiny.path, tiny.prefix.tokens, tiny.live, n_greedy=1)
    assert result["kl_mean"] < 1e-5


@pytest.mark.parametrize("lookup", ["stock", "scan", "auto"])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_every_path_is_exact(tiny, lookup, flash_attn):
    full = Scorer(tiny.path, tiny.prefix.tokens).log_probs(tiny.live)
    memory = tiny.save(tiny.exact(), "exact")
    attached = Scorer(tiny.path, memory=memory, lookup=lookup, flash_attn=flash_attn)
    assert kl(full, attached.log_probs(tiny.live)).mean() < 1e-5
    assert kl(full[:1], attached.log_probs(tiny.live[:1])).mean() < 1e-5  # one token: the op splits rows, not queries


def test_far_positions(tiny):
    """RoPE is relative: the memory is as exact a thousand tokens into the generation."""
    memory = tiny.save(tiny.exact(), "exact")
    live = (tiny.live * 10)[:1000]
    full = Scorer(tiny.path, tiny.prefix.tokens, n_live=1024).log_probs(live)
    attached = Scorer(tiny.path, memory=memory, n_live=1024).log_probs(live)
    assert kl(full[-100:], attached[-100:]).mean() < 1e-5
