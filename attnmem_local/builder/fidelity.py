"""How well a memory stands for its prefix, measured by the builder on live text that it was not fitted to."""

import torch

from ..memory.memory import Memory
from .capture import Packed, PrefixKV
from .entries.target import Target
from .memory_state import Converted, memory_state
from .model import BuildModel
from .state import State


@torch.no_grad()
def held_out_fidelity(model: BuildModel, kv: PrefixKV, memory: Memory, windows: list[list[int]]) -> dict[str, float]:
    """The numbers that the memory file records.

    kl_mean, kl_none: KL to the full-prefix run with the memory and without the prefix, in nats per position
    top1: share of positions with the same most likely token
    nll_full, nll_memory, nll_none: of the text, in nats per token
    tokens: positions
    """
    converted: Converted = {}

    def full(layer: int, target: Target) -> None:
        return None

    def remembered(layer: int, target: Target) -> State:
        return memory_state(memory, layer, model.to_gguf_order(target.q), converted)

    def none(layer: int, target: Target) -> State:
        return torch.zeros_like(target.o), torch.full_like(target.lse, -torch.inf)

    result: dict[str, float] = {}
    for name, visit in {"full": full, "memory": remembered, "none": none}.items():
        run = Packed(kv, windows, visit)
        log_p = run.run(model).float().log_softmax(-1)
        used = run.window >= 0
        follows = used[:, 1:] & (run.window[:, 1:] == run.window[:, :-1])
        true = log_p[:, :-1].gather(-1, run.tokens[:, 1:, None].to(log_p.device))[..., 0]
        result[f"nll_{name}"] = -float(true[follows].mean())
        log_p = log_p[used]
        if name == "full":
            expected = log_p
            continue
        result["kl_mean" if name == "memory" else "kl_none"] = float((expected.exp() * (expected - log_p)).sum(-1).mean())
        if name == "memory":
            result["top1"] = float((expected.argmax(-1) == log_p.argmax(-1)).float().mean())
    result["tokens"] = float(used.sum())
    return result
