"""What an error in the output of a head does to the distribution of the next token.

To second order, KL(p‖p') = ½·E_y (∇log p(y)·δ)² for a change δ and tokens y drawn from p (the Fisher information). The
gradients at different positions are independent and have mean zero, so one backward pass from one drawn token per position
estimates E (g·δ)² for all heads and tokens at once. The average over tokens is kept, a matrix for each KV head. It belongs
to the model and changes little with the text, so it is measured once per model and cached.
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
from ..memory.spec import ModelSpec
from .capture import Packed, spread
from .job import Build
from .model import BuildModel

TOKENS = 1536  # tokens of live text that the gradients are averaged over
MAX = 1e15  # larger numbers could overflow in a product

_log = logging.getLogger(__name__)


def cache_path(model: BuildModel) -> Path:
    """Where the sensitivity of a model is kept. Raises BadInput if the user has no home folder."""
    return cache_folder() / f"sensitivity-{model.spec.fingerprint_norms}-{model.spec.block_count}.safetensors"


def sensitivity(build: Build) -> torch.Tensor:
    """The sensitivity of a model, from the cache or measured on live text: float32 [n_layer, n_head_kv, d_v, d_v].

    Half of error·S·error, summed over the query heads of a group, is what an error adds to the KL of that position.
    A cache that is damaged or cannot be written costs time and a warning, nothing else. Raises BadInput for a model
    whose gradients are not finite.
    """
    spec = build.model.spec
    try:
        path = cache_path(build.model)
    except BadInput as error:
        _log.warning("the sensitivity of the model cannot be cached: %s", error)
        path = None
    if path is not None and (cached := _cached(path, spec)) is not None:
        return cached
    with build.progress.stage("sensitivity") as step:
        measured = measure(build, step)
    if wrong := _wrong(measured, spec):
        raise BadInput(f"the sensitivity of this model cannot be measured: it {wrong}; the model seems to be damaged")
    if path is not None:
        _keep(measured, path)
    return measured


def _cached(path: Path, spec: ModelSpec) -> torch.Tensor | None:
    """The content of a cache file; None if there is none, or, with a warning, if it cannot be a sensitivity of the model."""
    try:
        if not os.path.lexists(path):
            return None
        if not path.is_file():  # opening a FIFO would block
            raise ValueError("is not a regular file")
        cached = load_file(path)["sensitivity"]
        if wrong := _wrong(cached, spec):
            raise ValueError(wrong)
        return cached
    except Exception as error:  # safetensors raises many kinds for half a file, or a file of another program
        _log.warning("'%s' is damaged and the sensitivity of the model is measured again: %s", path, error)
        return None


def _wrong(x: torch.Tensor, spec: ModelSpec) -> str | None:
    """Why a tensor cannot be a mean of g·gᵀ for every KV head; None if it can."""
    shape = (spec.block_count, spec.head_count_kv, spec.value_length, spec.value_length)
    if x.dtype != torch.float32 or x.shape != shape:
        return f"is {x.dtype} {list(x.shape)}, expected {torch.float32} {list(shape)}"
    if not (x.abs() <= MAX).all():
        return "has a value that is not finite or too large"
    diagonal = x.diagonal(dim1=-2, dim2=-1)
    bound = (diagonal[..., None] * diagonal[..., None, :]).clamp(min=0).sqrt()  # Cauchy-Schwarz
    if (diagonal < 0).any() or (x.abs() > 1.01 * bound + 1e-6 * diagonal.amax()).any() or not torch.allclose(x, x.mT):
        return "has a matrix that is not positive semidefinite"
    if (diagonal.sum((-2, -1)) == 0).any():
        return "is zero in a whole layer"
    return None


def _keep(x: torch.Tensor, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as part:
            save_file({"sensitivity": x}, part)
    except Exception as error:  # safetensors raises many kinds
        _log.warning("the sensitivity of the model could not be cached, the next build measures it again: %s", error)


def measure(build: Build, progress: Callable[[int], None]) -> torch.Tensor:
    """See sensitivity(). progress: is told the tokens of each window that is done."""
    spec, windows = build.model.spec, spread(build.text.windows, TOKENS)
    total = torch.zeros(spec.block_count, spec.head_count_kv, spec.value_length, spec.value_length)
    outputs: dict[int, torch.Tensor] = {}

    def keep(module, inputs, layer):
        outputs[layer] = inputs[0] if inputs[0].requires_grad else inputs[0].requires_grad_()
        outputs[layer].retain_grad()

    layers = build.model.module.get_decoder().layers
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs, il=il: keep(module, inputs, il))
        for il, layer in enumerate(layers)
    ]
    generator = torch.Generator().manual_seed(build.seed)
    try:
        for window in windows:  # one at a time, as the gradient needs all activations of a pass
            with torch.enable_grad():
                logits = Packed(build.kv, [window], lambda layer, target: None).run(build.model)[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).to(logits.device)
                logits.log_softmax(-1).gather(-1, drawn).sum().backward()
            for il, output in outputs.items():
                assert output.grad is not None
                g = output.grad[0].float().unflatten(-1, (spec.head_count_kv, -1, spec.value_length)).transpose(0, 1).flatten(1, 2)
                total[il] += (g.transpose(-1, -2) @ g).cpu() / (spec.head_count // spec.head_count_kv)
            outputs.clear()
            progress(len(window))
    finally:
        for hook in hooks:
            hook.remove()
    return total / sum(map(len, windows))


def is_cached(model: BuildModel) -> bool:
    """Whether there is a cache file for the model. Whether it is intact is not checked."""
    try:
        return cache_path(model).exists()
    except (OSError, BadInput):  # no home folder, or an unreadable one
        return False
