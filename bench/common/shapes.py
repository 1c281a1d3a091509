"""Models and memories of random numbers in realistic sizes: what a token costs does not depend on the numbers."""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from attnmem_local.builder.model import fingerprint_norms, fingerprint_vocab
from attnmem_local.builder.search.lists import n_lists
from attnmem_local.memory.entries import Entries, LayerMemory, Lists
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.spec import ModelSpec
from attnmem_local.memory.tables import quantize_rows

Q4_0 = gguf.GGMLQuantizationType.Q4_0
MIN_ENTRIES = 2048  # as MEM_SEARCH_MIN_ENTRIES in native/src/llama-adapter-mem-graph.cpp


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama model."""

    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    d: int  # size of a head
    n_vocab: int = 128256


LLAMA_1B = Shape(16, 2048, 8192, 32, 8, 64)  # Llama-3.2-1B
LLAMA_8B = Shape(32, 4096, 14336, 32, 8, 128)  # Llama-3.1-8B
TINY = Shape(2, 256, 512, 8, 2, 32, 2048)


def n_probe(n: int) -> int:
    """How many lists of a table of n entries are searched, as mem_n_probe in native/src/llama-adapter-mem-graph.cpp."""
    return 12 if n <= 16384 else 16


def write_llama(path: Path, shape: Shape) -> None:
    """A model of random weights in Q4_0; its vocabulary is the bytes and padding."""
    rng = np.random.default_rng(0)
    tokens = [*_byte_tokens(), *(f"[PAD{i}]" for i in range(256, shape.n_vocab))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(262144)
    writer.add_embedding_length(shape.n_embd)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(shape.d)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.UNUSED] * (shape.n_vocab - 256))
    writer.add_token_merges(["a b"])  # llama.cpp refuses an empty list
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, n_out: int, n_in: int) -> None:
        block, size = gguf.GGML_QUANT_SIZES[Q4_0]
        table = rng.integers(0, 256, (n_out, n_in // block, size), dtype=np.uint8)
        table[..., :2] = np.frombuffer(np.float16(0.25 / n_in**0.5).tobytes(), np.uint8)  # scale of a block
        writer.add_tensor(name, table.reshape(n_out, -1), raw_dtype=Q4_0)

    def add_norm(name: str) -> None:
        writer.add_tensor(name, np.ones(shape.n_embd, np.float32))

    add("token_embd.weight", shape.n_vocab, shape.n_embd)
    add_norm("output_norm.weight")
    for i in range(shape.n_layer):
        block = f"blk.{i}."
        add_norm(block + "attn_norm.weight")
        add(block + "attn_q.weight", shape.n_head * shape.d, shape.n_embd)
        add(block + "attn_k.weight", shape.n_head_kv * shape.d, shape.n_embd)
        add(block + "attn_v.weight", shape.n_head_kv * shape.d, shape.n_embd)
        add(block + "attn_output.weight", shape.n_embd, shape.n_head * shape.d)
        add_norm(block + "ffn_norm.weight")
        add(block + "ffn_gate.weight", shape.n_ff, shape.n_embd)
        add(block + "ffn_up.weight", shape.n_ff, shape.n_embd)
        add(block + "ffn_down.weight", shape.n_embd, shape.n_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_tokens() -> list[str]:
    """The bytes as GPT-2 spells them."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) if byte in shown else chr(256 + hidden.index(byte)) for byte in range(256)]


def lookup_table(spec: ModelSpec, n: int) -> Entries:
    """A table of n centroids for each KV head, in lists of the usual number and size."""
    rng = np.random.default_rng(0)
    total, n_list = n * spec.head_count_kv, n_lists(n)

    def table(rows: int, d: int) -> np.ndarray:
        return rng.standard_normal((rows, d), dtype=np.float32).astype(np.float16)

    def bias(key: np.ndarray) -> np.ndarray:
        return -np.square(key, dtype=np.float32).sum(-1) / 2

    key, list_key = table(total, spec.key_length), table(n_list * spec.head_count_kv, spec.key_length)
    first = np.arange(len(list_key) + 1, dtype=np.int64) * n // n_list
    lists = Lists(list_key, bias(list_key), first.astype(np.int32), np.arange(0, len(list_key) + 1, n_list, dtype=np.int32))
    offset = np.arange(0, total + 1, n, dtype=np.int32)
    lse = rng.standard_normal(total, dtype=np.float32)
    return Entries(key, bias(key), table(total, spec.value_length), offset, lse=lse, lists=lists)


def lookup_memory(spec: ModelSpec, n: int) -> Memory:
    """A memory with the same table of n entries per KV head in each layer."""
    layer = LayerMemory(centroid=lookup_table(spec, n))
    return Memory(spec, [0], "random", [{il: layer for il in range(spec.block_count)}], [0, 1])


def default_memory(model: Path, n_tokens: int) -> Memory:
    """As large as the default build makes it for a prefix of n_tokens tokens, with heads as uneven as those of real ones."""
    from .builder import default_anchors

    reader = gguf.GGUFReader(model)
    spec = model_spec(reader)
    weight = np.random.default_rng(0).lognormal(sigma=1.3, size=(spec.block_count, spec.head_count_kv))
    anchors = weight / weight.sum() * default_anchors(spec, n_tokens, sum(int(t.n_elements) for t in reader.tensors))
    return anchor_memory(spec, np.clip(anchors.astype(int), 2, n_tokens), n_tokens)


def anchor_memory(spec: ModelSpec, sizes: np.ndarray, n_tokens: int) -> Memory:
    """Anchors for a prefix of random tokens; sizes: how many in each layer and KV head, int [n_layer, n_head_kv]."""
    rng = np.random.default_rng(0)
    layers = {}
    for il, n in enumerate(sizes):
        k, v = (rng.standard_normal((n.sum(), d)).astype(np.float32) for d in (spec.key_length, spec.value_length))
        bias = rng.standard_normal(n.sum()).astype(np.float32)
        layers[il] = LayerMemory(anchor=Entries(quantize_rows(k), bias, quantize_rows(v), np.cumsum([0, *n], dtype=np.int32)))
    return Memory(spec, rng.integers(300, 1024, n_tokens).tolist(), "random", [layers], [0, n_tokens])


def model_spec(reader: gguf.GGUFReader) -> ModelSpec:
    """Of a llama model, without loading it."""
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
