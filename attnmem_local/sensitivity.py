"""What an error in the output of a head does to the distribution of the next token.

To second order, KL(p‖p') = ½·E_y (∇log p(y)·δ)² for a change δ and tokens y drawn from p (the Fisher information). As
the gradients at different positions are independent and have mean zero, one backward pass from one drawn token per
position gives an estimate of E (g·δ)² for all heads and tokens at once. Kept is its average over tokens, a matrix for
each KV head: it belongs to the model and changes little with the text, so it is measured once per model and cached.
"""

import os
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import load_file, save_file

from .capture import Packed, PrefixKV, spread
from .errors import Unreadable

TOKENS = 1536  # of live text that the gradients are averaged over


def cache_path(model) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "attnmem" / f"sensitivity-{model.spec.fingerprint_norms}-{model.spec.block_count}.safetensors"


def sensitivity(
    model, kv: PrefixKV, windows: list[list[int]], seed: int, progress: Callable[[int], None] = lambda n: None
) -> torch.Tensor:
    """The cached sensitivity of a model, or measured on live text and cached: float32 [n_layer, n_head_kv, d_v, d_v].

    Half of error·S·error, summed over the query heads of a group, is what an error adds to the KL of that position.
    """
    path = cache_path(model)
    spec = model.spec
    shape = (spec.block_count, spec.head_count_kv, spec.value_length, spec.value_length)
    if path.exists():
        try:
            found = load_file(path)["sensitivity"]
        except Exception as error:  # a file of another program, or half of one
            raise Unreadable(f"'{path}' is damaged ({error}); delete it to measure it again") from None
        if found.shape == shape:
            return found
    found = measure(model, kv, spread(windows, TOKENS), seed, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({"sensitivity": found}, part)
    os.replace(part, path)
    return found


def measure(model, kv: PrefixKV, windows: list[list[int]], seed: int, progress: Callable[[int], None] = lambda n: None) -> torch.Tensor:
    spec = model.spec
    total = torch.zeros(spec.block_count, spec.head_count_kv, spec.value_length, spec.value_length)
    outputs: dict[int, torch.Tensor] = {}

    def keep(module, inputs, layer):
        outputs[layer] = inputs[0] if inputs[0].requires_grad else inputs[0].requires_grad_()
        outputs[layer].retain_grad()

    layers = model.module.get_decoder().layers
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs, il=il: keep(module, inputs, il))
        for il, layer in enumerate(layers)
    ]
    generator = torch.Generator().manual_seed(seed)
    try:
        for window in windows:  # one by one: the activations of a whole pass are kept for the gradient
            with torch.enable_grad():
                logits = Packed(kv, [window], lambda layer, target: None).run(model)[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).to(logits.device)
                logits.log_softmax(-1).gather(-1, drawn).sum().backward()
            for il, output in outputs.items():
                g = output.grad[0].float().unflatten(-1, (spec.head_count_kv, -1, spec.value_length)).transpose(0, 1).flatten(1, 2)
                total[il] += (g.transpose(-1, -2) @ g).cpu() / (spec.head_count // spec.head_count_kv)
            outputs.clear()
            progress(len(window))
    finally:
        for hook in hooks:
            hook.remove()
    return total / sum(map(len, windows))


def is_cached(model) -> bool:
    """Whether a file has the sensitivity of the model already; whether it is whole is not looked at."""
    try:
        return cache_path(model).exists()
    except (OSError, RuntimeError):  # no home folder, or none that may be read
        return False
