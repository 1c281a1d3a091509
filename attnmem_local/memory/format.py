"""Names, keys and limits of the memory file, shared by its writer and its parser. docs/memory-format.md describes the format."""

import re

import numpy as np

FORMAT_VERSION = 2
ADAPTER_TYPE = "attention_state_memory"
MAX_BLOCKS = 512  # llama.cpp's LLAMA_MAX_LAYERS
MAX_HEADS = 1024
MAX_KV_HEADS = 1 << 22  # segments x layers x KV heads
MAX_KIND_TENSORS = 12  # tensors of one kind in one segment of one layer
MAX_SEGMENTS = 256
MAX_TOP_K = 1024
MAX_ABS = np.float32(1e15)  # the product of two numbers below it still fits into float32

FIDELITY = ("kl_mean", "kl_none", "top1", "nll_full", "nll_memory", "nll_none", "tokens")  # in the file all or none

BLOCK_NAME = re.compile(r"seg\.(\d{1,9})\.blk\.(\d{1,9})\.")

TYPES = {str: "str", int: "u32", float: "f32", list: "arr[i32]"}  # GGUF type of each Python type

MODEL_KEYS = {  # GGUF key of each field of ModelSpec
    "architecture": "general.architecture",
    "block_count": "attnmem.block_count",
    "head_count": "attnmem.attention.head_count",
    "head_count_kv": "attnmem.attention.head_count_kv",
    "key_length": "attnmem.attention.key_length",
    "value_length": "attnmem.attention.value_length",
    "scale": "attnmem.attention.scale",
    "rope_freq_base": "attnmem.rope.freq_base",
    "rope_freq_scale": "attnmem.rope.freq_scale",
    "fingerprint_norms": "attnmem.fingerprint.norms",
    "fingerprint_vocab": "attnmem.fingerprint.vocab",
}
