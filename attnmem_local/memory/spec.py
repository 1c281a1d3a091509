"""The properties in which a memory and the model it runs on must agree."""

from dataclasses import dataclass

import numpy as np


@dataclass
class ModelSpec:
    architecture: str  # named as in GGUF: llama, qwen2, ...
    block_count: int
    head_count: int
    head_count_kv: int
    key_length: int
    value_length: int
    scale: float  # factor of q·k in the attention logits
    rope_freq_base: float
    rope_freq_scale: float
    fingerprint_norms: str
    fingerprint_vocab: str

    def __post_init__(self):
        """Round numbers to float32, as the file stores them, so that a spec read back is equal to the one written."""
        for name in ("scale", "rope_freq_base", "rope_freq_scale"):
            setattr(self, name, float(np.float32(getattr(self, name))))

    def kv_bytes_per_token(self) -> int:
        """Bytes of one token in an F16 KV cache."""
        return self.block_count * self.head_count_kv * (self.key_length + self.value_length) * 2
