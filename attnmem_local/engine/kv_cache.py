"""Options of a context's KV cache that go together."""

from ..memory.errors import BadInput

KV_TYPES = {"f32": 0, "f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}  # ggml_type


def cache_options(kv_type: str | None = None, flash_attn: bool | None = None) -> dict[str, int | bool]:
    """The options type_k, type_v and flash_attn of llama_cpp.Llama; what is None stays as llama.cpp has it.

    A quantized cache needs flash attention, and turns it on. Raises BadInput if flash_attn is False then.
    """
    options: dict[str, int | bool] = {}
    is_quantized = kv_type is not None and kv_type.startswith("q")
    if is_quantized and flash_attn is False:
        raise BadInput(f"a {kv_type} cache needs flash attention; leave out '--flash-attn off', or choose f16")
    if kv_type is not None:
        options["type_k"] = options["type_v"] = KV_TYPES[kv_type]
    if is_quantized or flash_attn is not None:
        options["flash_attn"] = flash_attn is not False
    return options
