"""A model and its memories on the GPU give what they give on the CPU."""

import llama_cpp
import numpy as np
import pytest
from helpers.mixed import mixed_memory
from helpers.models import Tiny

from attnmem_local.engine.kv_cache import KV_TYPES
from attnmem_local.evaluate.scorer import Scorer, kl

Q8_0 = KV_TYPES["q8_0"]

pytestmark = pytest.mark.skipif(
    not llama_cpp.llama_supports_gpu_offload(), reason="no GPU, or built without it (./build.sh --cuda)"
)


@pytest.fixture(scope="module")
def tiny64(tmp_path_factory) -> Tiny:
    """With heads that flash attention has a kernel for."""
    return Tiny(tmp_path_factory.mktemp("tiny64"), head_dim=64)


@pytest.mark.parametrize("n_batch", [1, 2, 16, 17, 64])  # matrix products have other kernels for few tokens
@pytest.mark.parametrize(
    "options",
    [{}, {"flash_attn": True}, {"flash_attn": True, "type_k": Q8_0, "type_v": Q8_0}],
    ids=["", "flash", "flash-q8_0-cache"],
)
def test_the_gpu_gives_what_the_cpu_gives(tiny64, options, n_batch):
    path = tiny64.save(mixed_memory(tiny64.model.spec, tiny64.prefix, q8_0=True, times=20), "large")
    live = tiny64.live[:64]
    cpu, gpu, none = (
        Scorer(tiny64.path, memory=memory, n_batch=n_batch, n_gpu_layers=n, op_offload=False, **options).log_probs(live)
        for n, memory in ((0, path), (-1, path), (0, ()))
    )
    # the error of a query that finds the other of two entries stays with its token
    assert np.median(kl(cpu, gpu)) < 1e-3 and kl(cpu, gpu).mean() < 1e-2
    assert kl(cpu, none).mean() > 0.1
