"""All that bench takes from inside the builder: memories that no option of a build makes, queries, and sizes."""

from dataclasses import replace
from functools import lru_cache
from unittest.mock import patch

import numpy as np
import torch
import transformers

from attnmem_local.builder import budget, job
from attnmem_local.builder.attention import ATTENTION_NAME
from attnmem_local.builder.budget import TOKENS, curves, head_bytes, plan_for_bytes, uniform_plan
from attnmem_local.builder.capture import PrefixKV, capture, prefill, spread
from attnmem_local.builder.entries.target import Target
from attnmem_local.builder.fidelity import held_out_fidelity
from attnmem_local.builder.fit import fit_memory
from attnmem_local.builder.job import Build, LiveText
from attnmem_local.builder.model import BuildModel, _spec, load_model
from attnmem_local.builder.progress import Progress
from attnmem_local.builder.search.index import searchable
from attnmem_local.builder.sensitivity import is_cached, sensitivity
from attnmem_local.builder.size import default_bytes
from attnmem_local.builder.sources import WINDOW
from attnmem_local.builder.sources.repeat_prefill import repeat_prefill
from attnmem_local.builder.sources.self_study import STUDY_WINDOW, self_study
from attnmem_local.engine.tokenizer import Tokenizer
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.errors import BadInput
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.prefix import Prefix

__all__ = ["is_cached", "searchable"]


@lru_cache(maxsize=1)
def build_model() -> BuildModel:
    """The default model."""
    return load_model(DEFAULT_MODEL)


def new_build(prefix: Prefix, windows, model: BuildModel | None = None, seed: int = 0) -> Build:
    """A build that has come as far as the fit, for live text like these windows."""
    model = model or build_model()
    return Build(model, prefix, seed, Progress(), kv=prefill(model, prefix.tokens), text=LiveText(windows))


def study_windows(prefix: Prefix, n_study: int) -> list[list[int]]:
    """What a build without traces is made from: the prefix repeated, and windows of self-study."""
    return repeat_prefill(prefix, WINDOW) + self_study(new_build(prefix, []), n_study, STUDY_WINDOW)


def study_fidelity(model: BuildModel, memory: Memory, n_study: int, seed: int) -> dict[str, float]:
    """Fidelity in PyTorch on windows of self-study that the memory was not built from."""
    build = new_build(memory.prefix, [], model, seed)
    return held_out_fidelity(model, build.kv, memory, self_study(build, n_study, STUDY_WINDOW))


def full_effort():
    """A context in which a small prefix gets as much self-study and tuning as a long one."""
    return patch.object(job, "LONG", 1)


def without_tuning() -> None:
    """Let builds of this process not tune their anchors: a quick trial is only about whether a command works."""
    budget.TUNE_STEPS = 2


def captured(prefix: Prefix, windows: list[list[int]]) -> tuple[PrefixKV, list[Target]]:
    """Keys and values of a prefix; for each layer the queries of these windows and their states over the prefix."""
    kv = prefill(build_model(), prefix.tokens)
    return kv, capture(build_model(), kv, windows)


def uniform_memory(prefix: Prefix, windows, anchors: int = 0, entries: int = 0, heads=..., eight_bit: bool = False) -> Memory:
    """The same number of anchors in each KV head; looked-up entries in some heads (an index [segment, layer, head]) or in all.

    Entries are residuals over anchors, centroids without them.
    """
    plan = uniform_plan(build_model().spec, anchors=anchors, eight_bit=eight_bit, tune_steps=budget.TUNE_STEPS)
    plan.entries[heads] = entries
    return fit_memory(new_build(prefix, windows), plan)


def half_precision_memory(prefix: Prefix, windows, nbytes: int) -> Memory:
    """The anchors that a build for a number of bytes chooses, in F16 tables, which take more bytes."""
    build = new_build(prefix, windows)
    return fit_memory(build, replace(plan_for_bytes(build, nbytes), eight_bit=False))


def most_sensitive(prefix: Prefix, windows, anchors: int, n: int) -> tuple[np.ndarray, ...]:
    """Index of the n heads [segment, layer, KV head] in which this number of anchors alone raises the KL most."""
    build = new_build(prefix, windows)
    targets = capture(build.model, build.kv, spread(windows, TOKENS))
    by_head = curves(build, targets, sensitivity(build), lambda n: None)
    worst = sorted(by_head, key=lambda head: -by_head[head].kl_of(anchors))[:n]
    return tuple(np.array(worst).T)


def default_anchors(spec, n_tokens: int, n_parameters: int) -> float:
    """How many anchors in all a default build has for a prefix of n_tokens tokens."""
    nbytes = default_bytes(n_tokens * spec.kv_bytes_per_token(), n_parameters)
    return nbytes / head_bytes(spec, 1, n_tokens + 1, eight_bit=True)


def gguf_order(key: torch.Tensor) -> np.ndarray:
    """Keys or queries in the order of the GGUF, float32."""
    return build_model().to_gguf_order(key).cpu().numpy()


class RandomTokenizer(Tokenizer):
    """Any text is 16 random tokens; any tokens are no text."""

    bos = ""

    def __init__(self, n_vocab: int):
        self.n_vocab = n_vocab

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return np.random.default_rng(len(text)).integers(300, self.n_vocab, 16).tolist()

    def decode(self, tokens: list[int]) -> str:
        return ""

    def is_special(self, token: int) -> bool:
        return False

    @property
    def template(self):
        raise BadInput("a model of random weights has no chat template")


def random_model(shape, device: str) -> BuildModel:
    """A BuildModel of random weights with a shapes.Shape, whose tokenizer gives random text."""
    config = transformers.LlamaConfig(
        num_hidden_layers=shape.n_layer,
        hidden_size=shape.n_embd,
        intermediate_size=shape.n_ff,
        num_attention_heads=shape.n_head,
        num_key_value_heads=shape.n_head_kv,
        head_dim=shape.d,
        vocab_size=shape.n_vocab,
        max_position_embeddings=262144,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with torch.device(device):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)

    spec = _spec(config, norms="random", vocab="random")
    return BuildModel(module.to(device).eval().requires_grad_(False), RandomTokenizer(shape.n_vocab), spec, interleaved=True)
