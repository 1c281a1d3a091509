"""Models and memories of random numbers, in sizes that matter for speed: what a token costs does not depend on the numbers."""

from pathlib import Path

import gguf
import numpy as np

from attnmem_local.budget import head_bytes
from attnmem_local.build import default_bytes
from attnmem_local.cli.common import DEFAULT_MODEL
from attnmem_local.memory import Entries, LayerMemory, Memory, ModelSpec, quantize_rows
from attnmem_local.model import fingerprint_norms, fingerprint_vocab

Q4_0 = gguf.GGMLQuantizationType.Q4_0


def write_llama_1b(path: Path) -> None:
    """A model with the shape of Llama-3.2-1B in Q4_0, and the tokenizer of the default model, filled up."""
    n_layer, n_embd, n_ff, n_head, n_head_kv, d, n_vocab = 16, 2048, 8192, 32, 8, 64, 128256
    rng = np.random.default_rng(0)
    fields = gguf.GGUFReader(DEFAULT_MODEL).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(n_layer)
    writer.add_context_length(131072)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(d)
    writer.add_vocab_size(n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"].contents())
    writer.add_token_list([*tokens, *(f"[PAD{i}]" for i in range(len(tokens), n_vocab))])
    writer.add_token_types([*fields["tokenizer.ggml.token_type"].contents(), *[gguf.TokenType.UNUSED] * (n_vocab - len(tokens))])
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, n_out: int, n_in: int) -> None:
        block, size = gguf.GGML_QUANT_SIZES[Q4_0]
        table = rng.integers(0, 256, (n_out, n_in // block, size), dtype=np.uint8)
        table[..., :2] = np.frombuffer(np.float16(0.25 / n_in**0.5).tobytes(), np.uint8)  # the scale of a block
        writer.add_tensor(name, table.reshape(n_out, -1), raw_dtype=Q4_0)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(n_embd, np.float32))

    add("token_embd.weight", n_vocab, n_embd)
    add_norm("output_norm.weight")
    for i in range(n_layer):
        block = f"blk.{i}."
        add_norm(block + "attn_norm.weight")
        add(block + "attn_q.weight", n_head * d, n_embd)
        add(block + "attn_k.weight", n_head_kv * d, n_embd)
        add(block + "attn_v.weight", n_head_kv * d, n_embd)
        add(block + "attn_output.weight", n_embd, n_head * d)
        add_norm(block + "ffn_norm.weight")
        add(block + "ffn_gate.weight", n_ff, n_embd)
        add(block + "ffn_up.weight", n_ff, n_embd)
        add(block + "ffn_down.weight", n_embd, n_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def default_memory(model: Path, n_tokens: int) -> Memory:
    """As large as the default build makes it for a prefix of so many tokens, with heads of as uneven size."""
    reader = gguf.GGUFReader(model)
    spec = _spec(reader)
    rng = np.random.default_rng(0)
    nbytes = default_bytes(n_tokens * spec.kv_bytes_per_token(), sum(int(t.n_elements) for t in reader.tensors))
    weight = rng.lognormal(sigma=1.3, size=(spec.block_count, spec.head_count_kv))
    anchors = weight / weight.sum() * nbytes / head_bytes(spec, 1, n_tokens + 1, eight_bit=True)
    sizes = np.clip(anchors.astype(int), 2, n_tokens)
    layers = {}
    for il, n in enumerate(sizes):
        k, v = (rng.standard_normal((n.sum(), d)).astype(np.float32) for d in (spec.key_length, spec.value_length))
        bias = rng.standard_normal(n.sum()).astype(np.float32)
        layers[il] = LayerMemory(anchor=Entries(quantize_rows(k), bias, quantize_rows(v), np.cumsum([0, *n], dtype=np.int32)))
    return Memory(spec, rng.integers(300, 1024, n_tokens).tolist(), "random", [layers], [0, n_tokens])


def _spec(reader: gguf.GGUFReader) -> ModelSpec:
    architecture = reader.fields["general.architecture"].contents()

    def field(name: str):
        return reader.fields[f"{architecture}.{name}"].contents()

    d = field("embedding_length") // field("attention.head_count")
    return ModelSpec(
        architecture=architecture,
        block_count=field("block_count"),
        head_count=field("attention.head_count"),
        head_count_kv=field("attention.head_count_kv"),
        key_length=d,
        value_length=d,
        scale=d**-0.5,
        rope_freq_base=field("rope.freq_base"),
        rope_freq_scale=1.0,
        fingerprint_norms=fingerprint_norms({t.name: t.data for t in reader.tensors if t.name.endswith("norm.weight")}),
        fingerprint_vocab=fingerprint_vocab(reader.fields["tokenizer.ggml.tokens"].contents()),
    )
