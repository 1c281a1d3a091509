"""Scores of a prefix, a memory or none on the windows of a case, in the llama.cpp runtime."""

from functools import lru_cache
from pathlib import Path

import gguf
import numpy as np

from attnmem_local.evaluate.scorer import Scorer
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.memory import Memory

from .cases import Case, f32_model
from .metrics import compare
from .paths import BUILD
from .shapes import model_spec


def score(case: Case, model: Path, prefix=(), memory=(), **options) -> dict:
    """What metrics.compare gives for a run of a model file with this prefix or memory, against its full-prefix run."""
    return compare(full(case, model), log_probs(case, model, prefix, memory, **options), [w.tokens[w.scored] for w in case.windows])


@lru_cache(maxsize=2)
def full(case: Case, model: Path) -> list[np.ndarray]:
    return log_probs(case, model, case.prefix.tokens)


def log_probs(case: Case, model: Path, prefix=(), memory=(), **options) -> list[np.ndarray]:
    """Of each window at its scored positions, float32 [n_scored, n_vocab]."""
    scorer = Scorer(model, prefix, n_live=max(len(w.tokens) for w in case.windows), memory=memory, **options)
    rows = [scorer.log_probs(w.tokens)[w.scored].astype(np.float32) for w in case.windows]
    scorer.close()
    return rows


def score_memory(case: Case, memory: Memory, name: str) -> dict:
    """Bytes and score of a memory on the F32 copy; it is left in the file memory_path(name)."""
    memory.save(memory_path(name))
    return {"bytes": memory.nbytes(), **score(case, f32_model(), memory=memory_path(name))}


def memory_path(name: str) -> Path:
    return BUILD / f"{name}.mem.gguf"


def kv_bytes(n_tokens: int) -> int:
    """Bytes of the F16 KV cache of n tokens of the default model."""
    return n_tokens * _spec().kv_bytes_per_token()


@lru_cache(maxsize=1)
def _spec():
    return model_spec(gguf.GGUFReader(DEFAULT_MODEL))
