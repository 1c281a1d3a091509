"""How well a memory stands for its prefix, measured by the builder on live text that it has not seen."""

import torch

from ..memory.memory import Memory
from .capture import Packed, PrefixKV
from .memory_state import memory_state


@torch.no_grad()
def held_out_fidelity(model, kv: PrefixKV, memory: Memory, windows: list[list[int]]) -> dict[str, float]:
    """kl_mean and kl_none: KL to the full-prefix run with the memory and without the prefix, in nats per position; top1: share
    of positions with the same most likely token; nll_full, nll_memory, nll_none: of the text, in nats per token; tokens.
    """

    def none(layer, target):
        return torch.zeros_like(target.o), torch.full_like(target.lse, -torch.inf)

    tables = {}
    past = {
        "full": lambda layer, target: None,
        "memory": lambda layer, target: memory_state(memory, layer, model.to_gguf_order(target.q), tables),
        "none": none,
    }
    result: dict[str, float] = {}
    for name, visit in past.items():
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
