"""Tiny random models as GGUF files, with the first tokens of the default model's tokenizer."""

from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 1024
N_EMBD, N_FF, N_LAYER, N_HEAD, N_HEAD_KV = 64, 96, 3, 4, 2

_HAS_BIAS, _HAS_QK_NORM = {"qwen2"}, {"qwen3"}


def write_tiny(
    path: Path,
    default_model: Path,
    architecture: str = "llama",
    seed: int = 0,
    norm_seed: int = 0,
    head_dim: int = 16,
    template: str | None = None,
    add_bos: bool = False,
    spm: bool = False,
) -> Path:
    """Write a tiny model.

    seed: of all weights but the norm tensors, which depend on norm_seed; models that differ in norm_seed alone pass as fine-tunes.
    template: a chat template in place of the default model's. spm: use an invented SentencePiece vocabulary.
    """
    rng = np.random.default_rng(seed)
    norm_rng = np.random.default_rng([norm_seed, 1])

    def contents(key):
        return contents_of(default_model, f"tokenizer.ggml.{key}")

    tokens = contents("tokens")[:N_VOCAB]
    known = set(tokens)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(N_LAYER)
    writer.add_context_length(8192)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(N_VOCAB)
    if spm:
        add_spm(writer)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(contents("pre"))
        writer.add_token_list(tokens)
        writer.add_token_types(contents("token_type")[:N_VOCAB])
        writer.add_token_merges([m for m in contents("merges") if m.replace(" ", "") in known and set(m.split()) <= known])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if add_bos:
        writer.add_add_bos_token(True)
    writer.add_chat_template(template or contents_of(default_model, "tokenizer.chat_template"))

    def add(name, *shape):
        writer.add_tensor(name, (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32))

    def add_norm(name, size):
        writer.add_tensor(name, (1 + 0.1 * norm_rng.standard_normal(size)).astype(np.float32))

    writer.add_tensor("token_embd.weight", rng.standard_normal((N_VOCAB, N_EMBD)).astype(np.float32))
    add("output.weight", N_VOCAB, N_EMBD)
    add_norm("output_norm.weight", N_EMBD)
    for i in range(N_LAYER):
        block = f"blk.{i}."
        add_norm(block + "attn_norm.weight", N_EMBD)
        for name, n_head in (("q", N_HEAD), ("k", N_HEAD_KV), ("v", N_HEAD_KV)):
            writer.add_tensor(
                f"{block}attn_{name}.weight",
                (2 if name != "v" else 1) * rng.standard_normal((n_head * head_dim, N_EMBD)).astype(np.float32) * N_EMBD**-0.5,
            )
            if architecture in _HAS_BIAS:
                writer.add_tensor(f"{block}attn_{name}.bias", rng.standard_normal(n_head * head_dim).astype(np.float32))
            if architecture in _HAS_QK_NORM and name != "v":
                add_norm(f"{block}attn_{name}_norm.weight", head_dim)
        add(block + "attn_output.weight", N_EMBD, N_HEAD * head_dim)
        add_norm(block + "ffn_norm.weight", N_EMBD)
        add(block + "ffn_gate.weight", N_FF, N_EMBD)
        add(block + "ffn_up.weight", N_FF, N_EMBD)
        add(block + "ffn_down.weight", N_EMBD, N_FF)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@lru_cache
def contents_of(path: Path, key: str):
    return _reader(path).fields[key].contents()


@lru_cache
def _reader(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def add_spm(writer: gguf.GGUFWriter) -> None:
    """A SentencePiece vocabulary of bytes, letters and a few longer pieces, which adds a space before texts, as Llama 2 does."""
    letters = [chr(c) for c in range(33, 127)]
    longer = ["▁▁", "te", "tea", "▁te", "▁tea", "Gr", "Gre", "Gree", "▁Gree", "▁Green", "en", "een"]
    pieces = ["▁", *letters, *("▁" + c for c in letters), *longer]
    special = [("<unk>", gguf.TokenType.UNKNOWN), ("<s>", gguf.TokenType.CONTROL), ("</s>", gguf.TokenType.CONTROL)]
    tokens = [*special, *((f"<0x{i:02X}>", gguf.TokenType.BYTE) for i in range(256)), *((p, gguf.TokenType.NORMAL) for p in pieces)]
    tokens += [(f"<unused{i}>", gguf.TokenType.UNUSED) for i in range(N_VOCAB - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_scores([float(len(text)) if kind == gguf.TokenType.NORMAL else 0.0 for text, kind in tokens])
    writer.add_add_space_prefix(True)
