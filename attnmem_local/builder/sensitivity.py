"""What an error in the output of a head does to the distribution of the next token.

To second order, KL(p‖p') = ½·E_y (∇log p(y)·δ)² for a change δ and tokens y drawn from p (the Fisher information). As
the gradients at different positions are independent and have mean zero, one backward pass from one drawn token per
position gives an estimate of E (g·δ)² for all heads and tokens at once. Kept is its average over tokens, a matrix for
each KV head: it belongs to the model and changes little with the text, so it is measured once per model and cached.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..library import cache_folder
from ..memory.errors import BadInput
from ..memory.files import replace_file
from .capture import Packed, PrefixKV, spread

TOKENS = 1536  # of live text that the gradients are averaged over
MAX = 1e15  # larger numbers could overflow in a product

_log = logging.getLogger(__name__)


def cache_path(model) -> Path:
    """Where the sensitivity of a model is kept. Raises BadInput if the user has no home folder."""
    return cache_folder() / f"sensitivity-{model.spec.fingerprint_norms}-{model.spec.block_count}.safetensors"


def sensitivity(
    model, kv: PrefixKV, windows: list[list[int]], seed: int, progress: Callable[[int], None] = lambda n: None
) -> torch.Tensor:
    """The cached sensitivity of a model, or measured on live text and cached: float32 [n_layer, n_head_kv, d_v, d_v].

    Half of error·S·error, summed over the query heads of a group, is what an error adds to the KL of that position.
    A cache that is damaged or cannot be written costs time and a warning, nothing else. Raises BadInput for a model
    whose gradients are not finite.
    """
    try:
        path = cache_path(model)
    except BadInput as error:
        _log.warning("the sensitivity of the model cannot be cached: %s", error)
        path = None
    if path is not None and (found := _cached(path, model.spec)) is not None:
        return found
    found = measure(model, kv, spread(windows, TOKENS), seed, progress)
    if wrong := _wrong(found, model.spec):
        raise BadInput(f"the sensitivity of this model cannot be measured: it {wrong}; the model seems to be damaged")
    if path is not None:
        _keep(found, path)
    return found


def _cached(path: Path, spec) -> torch.Tensor | None:
    """What a cache file holds; None if there is none, or, with a warning, if it cannot be a sensitivity of the model."""
    try:
        if not os.path.lexists(path):
            return None
        if not path.is_file():  # opening a FIFO would block
            raise ValueError("is not a regular file")
        found = load_file(path)["sensitivity"]
        if wrong := _wrong(found, spec):
            raise ValueError(wrong)
        return found
    except Exception as error:  # of another program, or half of one: safetensors raises many kinds
        _log.warning("'%s' is damaged and the sensitivity of the model is measured again: %s", path, error)
        return None


def _wrong(found: torch.Tensor, spec) -> str | None:
    """Why a tensor cannot be a mean of g·gᵀ for every KV head; None if it can."""
    shape = (spec.block_count, spec.head_count_kv, spec.value_length, spec.value_length)
    if found.dtype != torch.float32 or found.shape != shape:
        return f"is {found.dtype} {list(found.shape)}, expected {torch.float32} {list(shape)}"
    if not (found.abs() <= MAX).all():
        return "has a value that is not finite or too large"
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    bound = (diagonal[..., None] * diagonal[..., None, :]).clamp(min=0).sqrt()  # Cauchy-Schwarz
    if (diagonal < 0).any() or (found.abs() > 1.01 * bound + 1e-6 * diagonal.amax()).any() or not torch.allclose(found, found.mT):
        return "has a matrix that is not positive semidefinite"
    if (diagonal.sum((-2, -1)) == 0).any():
        return "is zero in a whole layer"
    return None


def _keep(found: torch.Tensor, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as part:
            save_file({"sensitivity": found}, part)
    except Exception as error:  # safetensors has exceptions of its own
        _log.warning("the sensitivity of the model could not be cached, the next build measures it again: %s", error)


def measure(
    model, kv: PrefixKV, windows: list[list[int]], seed: int, progress: Callable[[int], None] = lambda n: None
) -> torch.Tensor:
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
    except (OSError, BadInput):  # no home folder, or none that may be read
        return False
