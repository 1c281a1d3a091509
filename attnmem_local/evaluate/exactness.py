"""Comparing the exact memory of a prefix with the prefix itself, which tests capture, layout, positions and merge at once."""

import ctypes
import os

import llama_cpp
import numpy as np
import torch

from ..builder.build import exact_memory
from ..builder.capture import PrefixKV, prefill
from ..builder.model import BuildModel, load_model
from ..builder.progress import Progress
from ..memory.prefix import Prefix
from ..runtime.llama import MemoryLlama
from .scorer import Scorer, kl

F32 = 0  # ggml_type


def exactness(
    model_path: str | os.PathLike, tokens: list[int], live: list[int], *, n_greedy: int = 64, progress=None, **options
) -> dict[str, float | bool]:
    """The deviation of the exact memory of a prefix (every key and value an anchor with bias 0) from the prefix itself.

    Two memories are compared: one from the keys and values that the builder captures in transformers, one from those in the
    runtime's KV cache. The reference is the full prefix with an F16 cache, without flash attention.

    tokens: the prefix. live: the text after it.
    options: how the memories are run, such as type_k, type_v and flash_attn of MemoryLlama.
    Returns
        kl_builder, kl_runtime, kl_mean: mean KL of each memory to the reference, and the larger of the two.
        kl_floor: the runtime's noise, as the KL of the full prefix run with these options, or with flash attention if there
            are none, to the reference.
        greedy_equal: whether both memories give the same n_greedy tokens as the reference.
    """
    progress = progress or Progress(quiet=True)
    with progress.stage("load model"):
        model = load_model(model_path)
    prefix = Prefix(tokens, model.tokenizer.decode(tokens))
    with progress.stage("prefill", len(tokens)) as step:
        captured = {"builder": prefill(model, tokens, progress=step), "runtime": runtime_kv(model_path, model, tokens)}

    with progress.stage("score"):
        n_live = len(live) + n_greedy
        full = Scorer(model_path, tokens, n_live=n_live)
        expected, expected_tokens = full.log_probs(live), full.greedy(live, n_greedy)
        floor = Scorer(full, tokens, n_live=n_live, **(options or {"flash_attn": True}))
        result = {"kl_floor": float(kl(expected, floor.log_probs(live)).mean())}
        floor.close()
        equal = []
        for name, kv in captured.items():
            run = Scorer(full, memory=exact_memory(model, prefix, kv), n_live=n_live, **options)
            result[f"kl_{name}"] = float(kl(expected, run.log_probs(live)).mean())
            equal.append(run.greedy(live, n_greedy) == expected_tokens)
            run.close()
        full.close()
    return {"kl_mean": max(result["kl_builder"], result["kl_runtime"]), **result, "greedy_equal": all(equal)}


def runtime_kv(model_path: str | os.PathLike, model: BuildModel, tokens: list[int]):
    """Keys and values of a prefix from an F32 KV cache of llama.cpp, moved to positions −P … −1."""
    spec, n = model.spec, len(tokens)
    llama = MemoryLlama(str(model_path), n_ctx=n, verbose=False, type_k=F32, type_v=F32)
    llama.eval(tokens)
    size = llama_cpp.llama_state_seq_get_size(llama.ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    llama_cpp.llama_state_seq_get_data(llama.ctx, buffer, size, 0)
    llama.close()

    # written by llama_kv_cache::state_write: the keys of all layers as [cell, head, d], then the values as [head, d, cell]
    data = memoryview(buffer).cast("B")
    kv = PrefixKV()
    position = 4 + 4 + 4 + 4 + n * (4 + 4 + 4) + 4 + 4  # bytes: magic, sequence, streams, cells, cell positions, v_trans, layers
    for il in range(spec.block_count):
        position += 4 + 8  # type, row size
        k = np.frombuffer(data, np.float32, n * spec.head_count_kv * spec.key_length, position)
        position += k.nbytes
        k = k.reshape(n, spec.head_count_kv, spec.key_length).swapaxes(0, 1)
        kv.k.append(model.rotate(model.from_gguf_order(torch.from_numpy(k.copy())), -n).to(model.device_of(il)))
    for il in range(spec.block_count):
        position += 4 + 4 + 4  # type, element size, rows
        v = np.frombuffer(data, np.float32, n * spec.head_count_kv * spec.value_length, position)
        position += v.nbytes
        v = v.reshape(spec.head_count_kv, spec.value_length, n).swapaxes(1, 2)
        kv.v.append(torch.from_numpy(v.copy()).to(model.device_of(il)))
    assert position == size, "the layout of llama_kv_cache::state_write has changed"
    return kv
