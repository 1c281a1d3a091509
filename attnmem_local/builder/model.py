"""The model to build from: a transformers directory, or the same GGUF that will run with the memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils

from ..engine.template import ChatTemplate
from ..engine.tokenizer import GgufTokenizer, Tokenizer
from ..memory.errors import BadInput, Unsupported
from ..memory.filekind import file_kind
from ..memory.messages import check_text
from ..memory.spec import ModelSpec
from .attention import ATTENTION_NAME

# model_type of transformers -> architecture of GGUF, and whether the GGUF stores Q and K with interleaved RoPE pairs
_ARCHITECTURES = {"llama": ("llama", True), "mistral": ("llama", True), "qwen2": ("qwen2", False), "qwen3": ("qwen3", False)}
_FNV_BASIS = 0xCBF29CE484222325
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass
class BuildModel:
    """A model in PyTorch, and what a memory records about it."""

    module: transformers.PreTrainedModel
    tokenizer: Tokenizer
    spec: ModelSpec
    interleaved: bool  # GGUF order of a head: gguf[2i] = hf[i], gguf[2i + 1] = hf[i + d/2]
    file_name: str | None = None  # of the GGUF or directory, without its folder: the runtime finds the model by it

    @property
    def device(self) -> torch.device:
        return self.module.device

    def device_of(self, layer: int) -> torch.device:
        return next(self.module.get_decoder().layers[layer].parameters()).device

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def to_gguf_order(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys [..., d_k] from the order of transformers to that of the GGUF."""
        return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2) if self.interleaved else x

    def from_gguf_order(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) if self.interleaved else x

    def rotate(self, x: torch.Tensor, delta: int) -> torch.Tensor:
        """Queries or keys [..., d_k], after RoPE and in the order of transformers, moved by delta positions."""
        rotary = self.module.get_decoder().rotary_emb
        angle = delta * rotary.inv_freq.double().to(x.device)
        cos, sin = angle.cos().repeat(2), angle.sin().repeat(2)
        a, b = x.double().chunk(2, dim=-1)
        return (x.double() * cos + torch.cat((-b, a), dim=-1) * sin).to(x.dtype)


def load_model(path: str | os.PathLike, device: str | None = None) -> BuildModel:
    """Load a model to build from, on a GPU if there is one (float32 on the CPU, bfloat16 on CUDA).

    path: a transformers directory or a GGUF file.
    device: "cpu", "cuda" for as many GPUs as the model needs, or one GPU such as "cuda:1".
    Raises BadInput for a file that is not a model and for a device that is missing or too small, Unsupported for an
    architecture that the builder does not support.
    """
    path = Path(path)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device)
    if path.is_dir():
        config = transformers.AutoConfig.from_pretrained(path)
        _architecture(config)
        module = _module(path, device)
        transformers_tokenizer = _TransformersTokenizer(path)
        tensors = _norms_of_module(module, _architecture(config)[0])
        vocab = transformers_tokenizer.vocab(config.vocab_size)
        tokenizer: Tokenizer = transformers_tokenizer
    else:
        reader = _read_gguf(path)
        architecture = reader.fields["general.architecture"].contents()
        if architecture not in {name for name, _ in _ARCHITECTURES.values()}:
            raise Unsupported(
                f"the architecture '{architecture}' is not supported by the builder; it knows {sorted(_ARCHITECTURES)}"
            )
        with _loading(reader):
            module = _module(path.parent, device, gguf_file=path.name)
        tokenizer = GgufTokenizer(path)
        tensors = {t.name: t.data for t in reader.tensors if t.name.endswith("norm.weight")}
        vocab = reader.fields["tokenizer.ggml.tokens"].contents()
    module = module.eval().requires_grad_(False)
    spec = _spec(module.config, fingerprint_norms(tensors), fingerprint_vocab(vocab))
    return BuildModel(module, tokenizer, spec, _architecture(module.config)[1], path.name)


def _check_device(device: str) -> None:
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise BadInput(f"'{device}' is not a device that the builder knows; choose cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput("PyTorch sees no GPU; build with --device cpu, or install a PyTorch for CUDA")


class _Reader(gguf.GGUFReader):
    """Reads a GGUF through a plain array, whose many slices take a fraction of the time that those of a memmap take."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = mapped.view(np.ndarray)


def _read_gguf(path: Path) -> gguf.GGUFReader:
    if (kind := file_kind(path)) not in ("model", "unknown"):
        raise BadInput(f"'{path}' is {'not a GGUF file' if kind == 'other' else f'a {kind}'}; a model is needed here")
    try:
        reader = _Reader(path)
        reader.fields["general.architecture"].contents(), reader.fields["tokenizer.ggml.tokens"]
    except Exception as error:  # the reader checks little, so a damaged file can fail anywhere in it
        raise BadInput(f"the model '{path}' is incomplete or damaged ({type(error).__name__}: {error})") from None
    return reader


def _module(folder: Path, device: str, **options) -> transformers.PreTrainedModel:
    if device == "cpu":
        options["dtype"] = torch.float32
    else:
        options["dtype"] = torch.bfloat16
        options["device_map"] = "sequential" if device == "cuda" else device  # fills one GPU before the next
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION_NAME, **options)
    if device != "cpu" and {"cpu", "disk"} & set(map(str, getattr(module, "hf_device_map", {}).values())):
        raise BadInput("the available GPUs do not have enough memory for this model; build with --device cpu")
    return module


def fingerprint_hash(data: bytes, value: int) -> int:
    """A hash like FNV-1a, 64 bit, but over little-endian words of 8 bytes: zero-padded data, then its number of bytes."""
    words = np.frombuffer(data + bytes(-len(data) % 8), dtype="<u8").tolist()
    for word in [*words, len(data)]:
        value = (value ^ word) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def fingerprint_norms(tensors: dict) -> str:
    """A hash of the norm tensors (GGUF name -> float32 array), which every quantization keeps in float32."""
    value = _FNV_BASIS
    for name in sorted(tensors):
        value = fingerprint_hash(tensors[name].tobytes(), fingerprint_hash(name.encode(), value))
    return f"{value:016x}"


def fingerprint_vocab(tokens: list[str]) -> str:
    value = _FNV_BASIS
    for i, text in enumerate(tokens):
        value = fingerprint_hash((text or f"[EMPTY_{i}]").encode(), value)
    return f"{value:016x}"


class _TransformersTokenizer(Tokenizer):
    def __init__(self, path: Path):
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return self._tokenizer.encode(check_text(text, "the text"), add_special_tokens=add_bos)

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    @cached_property
    def _special(self) -> set[int]:
        return {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.content.strip()}

    def is_special(self, token: int) -> bool:
        return token in self._special

    @property
    def bos(self) -> str:
        return self._tokenizer.bos_token or ""

    @cached_property
    def template(self) -> ChatTemplate:
        source = self._tokenizer.chat_template
        source = source.get("default") if isinstance(source, dict) else source
        if source is None:
            raise BadInput("this model has no chat template; use text, and build the memory from text")
        return ChatTemplate(source, bos=self.bos, eos=self._tokenizer.eos_token or "")

    def vocab(self, size: int) -> list[str]:
        """Token texts as the conversion to GGUF writes them."""
        texts = {i: t for t, i in self._tokenizer.get_vocab().items()}
        return [texts.get(i, f"[PAD{i}]") for i in range(size)]


def _architecture(config) -> tuple[str, bool]:
    if config.model_type not in _ARCHITECTURES:
        raise Unsupported(
            f"the architecture '{config.model_type}' is not supported by the builder; it knows {sorted(_ARCHITECTURES)}"
        )
    return _ARCHITECTURES[config.model_type]


def _spec(config, norms: str, vocab: str) -> ModelSpec:
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise Unsupported("sliding-window attention cannot take a memory")
    rope = config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise Unsupported(f"RoPE scaling of type '{rope_type}' is not supported by the builder; it knows {_ROPE_TYPES}")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSpec(
        architecture=_architecture(config)[0],
        block_count=config.num_hidden_layers,
        head_count=config.num_attention_heads,
        head_count_kv=config.num_key_value_heads,
        key_length=head_dim,
        value_length=head_dim,
        scale=head_dim**-0.5,
        rope_freq_base=float(rope["rope_theta"]),
        rope_freq_scale=1.0 / rope["factor"] if rope_type == "linear" else 1.0,
        fingerprint_norms=norms,
        fingerprint_vocab=vocab,
    )


def _norms_of_module(module, architecture: str) -> dict:
    """The norm tensors under their GGUF names."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, module.config.num_hidden_layers)
    return {
        names.get_name(name, try_suffixes=(".weight",)): tensor.float().cpu().numpy()
        for name, tensor in module.state_dict().items()
        if name.endswith("norm.weight")
    }


@contextmanager
def _loading(reader: gguf.GGUFReader) -> Iterator[None]:
    """Makes transformers dequantize the GGUF of a reader silently and in half the time.

    By itself it would read the header of the file twice more, and make the table of tensor names again for every module.
    """
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with (
        patch.object(modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors),  # this bar ignores the verbosity
        patch.object(gguf, "GGUFReader", lambda path: reader),
        patch.object(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
    ):
        try:
            yield
        finally:
            transformers.logging.set_verbosity(level)
            transformers.logging.enable_progress_bar()
