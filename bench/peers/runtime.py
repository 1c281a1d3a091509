"""What llama.cpp itself offers: a shorter prefix, and a quantized KV cache."""

from ..common.cases import Case, f32_model
from ..common.scoring import score

Q4_0, Q8_0 = 2, 8  # ggml_type
# ggml_type, and bytes of a block of 32 values as a share of float16
QUANTIZED = {"q8_0": (Q8_0, 34 / 64), "q4_0": (Q4_0, 18 / 64)}


def full_prefix(case: Case) -> dict:
    return score(case, f32_model(), case.prefix.tokens)


def no_prefix(case: Case) -> dict:
    """Only the turns of the chat template."""
    return score(case, f32_model(), truncate(case, 0, "last"))


def truncated(case: Case, share: float) -> dict:
    """The prefix cut to its last or its first tokens, whichever gives the lower KL."""
    runs = {}
    for end in ("last", "first"):
        prefix = truncate(case, int(share * len(case.prefix.tokens)), end)
        runs[end] = score(case, f32_model(), prefix) | {"kept": end, "share": len(prefix) / len(case.prefix.tokens)}
    best = min(runs.values(), key=lambda run: run["kl"])
    return best | {f"kl_{end}": run["kl"] for end, run in runs.items()}


def truncate(case: Case, n: int, end: str) -> list[int]:
    """n tokens of the prefix; those of the chat template are always kept."""
    head, tail = case.frame
    tokens = case.prefix.tokens
    document = tokens[head : len(tokens) - tail]
    n = max(n - head - tail, 0)
    return tokens[:head] + (document[len(document) - n :] if end == "last" else document[:n]) + tokens[len(tokens) - tail :]


def quantized_kv(case: Case, name: str) -> dict:
    """The whole prefix, and the live text, in a quantized KV cache."""
    ggml_type, share = QUANTIZED[name]
    return score(case, f32_model(), case.prefix.tokens, type_k=ggml_type, type_v=ggml_type, flash_attn=True) | {"share": share}
