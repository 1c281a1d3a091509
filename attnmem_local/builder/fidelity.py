"""How well a memory stands for its prefix, measured by the builder on live text that it was not fitted to."""

from collections.abc import Callable

import torch

from ..memory.memory import Memory
from .capture import Packed, PrefixKV
from .entries.target import Target
from .memory_state import Converted, memory_state
from .model import BuildModel
from .state import State

Visit = Callable[[int, Target], State | None]  # as Packed takes it


def _full(layer: int, target: Target) -> None:
    return None


def _none(layer: int, target: Target) -> State:
    return torch.zeros_like(target.o), torch.full_like(target.lse, -torch.inf)


def _remembered(model: BuildModel, memory: Memory) -> Visit:
    converted: Converted = {}
    return lambda layer, target: memory_state(memory, layer, model.to_gguf_order(target.q), converted)


@torch.no_grad()
def held_out_fidelity(model: BuildModel, kv: PrefixKV, memory: Memory, windows: list[list[int]]) -> dict[str, float]:
    """The numbers that the memory file records.

    kl_mean, kl_none: KL to the full-prefix run with the memory and without the prefix, in nats per position
    top1: share of positions with the same most likely token
    nll_full, nll_memory, nll_none: of the text, in nats per token
    tokens: positions
    """
    visits: dict[str, Visit] = {"full": _full, "memory": _remembered(model, memory), "none": _none}
    result: dict[str, float] = {}
    for name, visit in visits.items():
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
        result["kl_mean" if name == "memory" else "kl_none"] = _kl(expected, log_p)
        if name == "memory":
            result["top1"] = float((expected.argmax(-1) == log_p.argmax(-1)).float().mean())
    result["tokens"] = float(used.sum())
    return result


class Judge:
    """The kl_mean of several memories of one prefix on the same windows: the full prefix is run once."""

    def __init__(self, model: BuildModel, kv: PrefixKV, windows: list[list[int]]):
        self.model, self.kv, self.windows = model, kv, windows
        self.expected = self._log_probs(_full)

    def kl(self, memory: Memory) -> float:
        return _kl(self.expected, self._log_probs(_remembered(self.model, memory)))

    @torch.no_grad()
    def _log_probs(self, visit: Visit) -> torch.Tensor:
        run = Packed(self.kv, self.windows, visit)
        return run.run(self.model).float().log_softmax(-1)[run.window >= 0]


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Mean KL of log-probabilities [n, n_vocab]."""
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
