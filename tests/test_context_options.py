"""Under each option of a context, the exact memory equals the prefix, or is refused with an error that names the option."""

import ctypes

import gguf
import llama_cpp
import numpy as np
import pytest
from helpers.models import Tiny
from llama_cpp._internals import LlamaBatch, LlamaContext

from attnmem_local.builder.build import exact_memory
from attnmem_local.builder.capture import prefill
from attnmem_local.engine import native
from attnmem_local.engine.kv_cache import KV_TYPES
from attnmem_local.evaluate.scorer import Scorer, kl, log_softmax
from attnmem_local.memory import errors
from attnmem_local.memory.prefix import Prefix
from attnmem_local.runtime.llama import MemoryLlama


def cache(kind: str, flash_attn: bool = True) -> dict:
    return {"type_k": KV_TYPES[kind], "type_v": KV_TYPES[kind], "flash_attn": flash_attn}


def log_probs(model, prefix: list[int], live: list[int], **options) -> np.ndarray:
    run = Scorer(model, prefix, n_live=len(live), **options)
    result = run.log_probs(live)
    run.close()
    return result


# llama.cpp rotates q, K and V before it quantizes them where the head size is a multiple of 64
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_a_memory_with_a_quantized_cache_is_as_exact_as_the_prefix(head_dim, tmp_path):
    tiny = Tiny(tmp_path, "llama", head_dim)
    memory = tiny.save(tiny.exact(), "exact")
    reference = log_probs(tiny.path, tiny.prefix.tokens, tiny.live, **cache("f32", flash_attn=False))
    quantized_keys_only = {"type_k": KV_TYPES["q8_0"], "flash_attn": False}
    for options in (
        cache("q8_0"),
        cache("q4_0"),
        cache("q8_0") | {"n_batch": 1},
        quantized_keys_only,
        cache("bf16"),
        cache("bf16", flash_attn=False),
    ):
        prefix_error = kl(reference, log_probs(tiny.path, tiny.prefix.tokens, tiny.live, **options)).mean()
        assert kl(reference, log_probs(tiny.path, [], tiny.live, memory=memory, **options)).mean() < 1.5 * prefix_error < 0.1


@pytest.mark.slow
def test_a_memory_of_a_real_model_with_a_quantized_cache_is_as_exact_as_the_prefix(
    default_model, default_build_model, readme_tokens, tmp_path
):
    prefix, live = readme_tokens[:256], readme_tokens[256:352]
    memory = tmp_path / "exact.mem.gguf"
    exact_memory(default_build_model, Prefix(prefix, ""), prefill(default_build_model, prefix)).save(memory)
    reference = log_probs(default_model, prefix, live)
    for kind in ("q8_0", "q4_0"):
        prefix_error = kl(reference, log_probs(default_model, prefix, live, **cache(kind))).mean()
        assert kl(reference, log_probs(default_model, [], live, memory=memory, **cache(kind))).mean() < 1.5 * prefix_error
    assert prefix_error < 0.2 * kl(reference, log_probs(default_model, [], live)).mean()


def test_heads_of_80_have_no_quantized_cache(tmp_path):
    """A block of 32 values would reach into the next head, so llama.cpp refuses the context."""
    tiny = Tiny(tmp_path, "llama", 80)
    with pytest.raises(errors.BadInput, match="a KV cache of another type"):
        MemoryLlama(str(tiny.path), verbose=False, **cache("q8_0"))


@pytest.fixture(scope="module")
def tiny64(tmp_path_factory) -> Tiny:
    """A tiny model with heads of a realistic size."""
    return Tiny(tmp_path_factory.mktemp("tiny64"), head_dim=64)


@pytest.fixture(scope="module")
def exact(tiny64):
    return tiny64.save(tiny64.exact(), "exact")


@pytest.mark.parametrize(
    "options",
    [
        {"n_batch": 7},
        {"n_batch": 64, "n_ubatch": 17},
        {"n_batch": 1},
        {"n_threads": 1, "n_threads_batch": 2},
        {"flash_attn": True},
        {"flash_attn": True, "n_batch": 1},
        cache("f32"),
        cache("f32", flash_attn=False),
        {"logits_all": True},
        {"offload_kqv": False},
        {"op_offload": False},
        {"swa_full": False},
        {"pooling_type": llama_cpp.LLAMA_POOLING_TYPE_MEAN},
        {"use_mmap": False},
        {"rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_NONE, "rope_freq_scale": 0.5},
        {"rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_LONGROPE, "yarn_orig_ctx": 128},
        {"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0},
        {"kv_overrides": {"tokenizer.ggml.add_bos_token": False}},
    ],
    ids=str,
)
def test_a_memory_is_exact_with_this_option(tiny64, exact, options):
    full = Scorer(tiny64.path, tiny64.prefix.tokens, **options).log_probs(tiny64.live)
    assert kl(full, Scorer(tiny64.path, memory=exact, **options).log_probs(tiny64.live)).mean() < 1e-5


@pytest.mark.parametrize(
    "options, match",
    [
        ({"rope_freq_base": 5e5}, "RoPE base"),
        ({"rope_freq_scale": 0.5}, "RoPE base"),
        ({"kv_overrides": {"llama.rope.scaling.factor": 2.0}}, "kv_overrides changes llama.rope.scaling.factor"),
        ({"kv_overrides": {"llama.attention.layer_norm_rms_epsilon": 1e-2}}, "layer_norm_rms_epsilon"),
        ({"rope_scaling_type": llama_cpp.LLAMA_ROPE_SCALING_TYPE_YARN}, "YaRN"),
        ({"yarn_ext_factor": 1.0}, "YaRN"),
        ({"yarn_attn_factor": 1.5}, "yarn_attn_factor"),
        ({"attention_type": llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL}, "causal"),
        ({"embedding": True}, "embeddings"),
        (cache("q8_0") | {"lookup": "stock"}, "quantized KV cache"),
    ],
    ids=str,
)
def test_a_memory_is_refused_with_this_option(tiny64, exact, options, match):
    llama = MemoryLlama(str(tiny64.path), verbose=False, **options)
    with pytest.raises(errors.Unsupported, match=match):
        llama.attach(exact)
    assert llama.memories == ()


def test_a_lora_adapter_is_refused(tiny64, exact, tmp_path):
    """The keys and values of the prefix were computed without the adapter."""
    path = tmp_path / "lora.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    writer.add_tensor("blk.0.attn_output.weight.lora_a", np.ones((1, 4 * 64), dtype=np.float32))
    writer.add_tensor("blk.0.attn_output.weight.lora_b", np.ones((64, 1), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    llama = MemoryLlama(str(tiny64.path), lora_path=str(path), verbose=False)
    with pytest.raises(errors.Unsupported, match="LoRA"):
        llama.attach(exact)


def test_a_control_vector_is_refused(tiny64, exact):
    llama = MemoryLlama(str(tiny64.path), verbose=False)
    direction = (ctypes.c_float * (2 * 64))(*([1.0] * 128))  # layers 1 and 2
    assert llama_cpp.llama_set_adapter_cvec(llama.ctx, direction, len(direction), 64, 1, 2) == 0
    with pytest.raises(errors.Unsupported, match="control vector"):
        llama.attach(exact)


def context(llama: MemoryLlama, kv_unified: bool) -> LlamaContext:
    """A context for three sequences on the model of a MemoryLlama."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified = 1024, 3, kv_unified
    return LlamaContext(model=llama._model, params=params, verbose=False)


def test_a_batch_of_several_sequences_shares_a_memory(tiny64, exact):
    llama = MemoryLlama(str(tiny64.path), verbose=False)
    loaded = llama.load_memory(exact)
    shared = context(llama, kv_unified=True)
    native.set_memories(shared.ctx, [loaded.handle], [0.0], "auto")
    chats = tiny64.live[:20], tiny64.live[20:70], tiny64.live[70:100]
    batch = LlamaBatch(n_tokens=128, embd=0, n_seq_max=3, verbose=False)
    for sequence, tokens in enumerate(chats):
        batch.add_sequence(tokens, sequence, logits_all=True)
    shared.decode(batch)
    logits = np.ctypeslib.as_array(shared.get_logits(), shape=(sum(map(len, chats)), llama.n_vocab())).copy()
    first = 0
    for tokens in chats:
        full = Scorer(tiny64.path, tiny64.prefix.tokens).log_probs(tokens)
        assert kl(full, log_softmax(logits[first : first + len(tokens)])).mean() < 1e-5
        first += len(tokens)


def test_a_context_with_a_kv_stream_per_sequence_is_refused(tiny64, exact):
    llama = MemoryLlama(str(tiny64.path), verbose=False)
    loaded = llama.load_memory(exact)
    with pytest.raises(errors.Unsupported, match="kv_unified"):
        native.set_memories(context(llama, kv_unified=False).ctx, [loaded.handle], [0.0], "auto")
