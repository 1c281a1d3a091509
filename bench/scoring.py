"""KL to the full-prefix run of the same model, and NLL of the true text, at the scored positions of a case's windows."""

import json
from functools import lru_cache
from pathlib import Path

import click
import gguf
import llama_cpp
import numpy as np
from prefixes import BUILD, Case, f32_model

from attnmem_local.evaluate.scorer import Scorer, kl, nll
from attnmem_local.library import DEFAULT_MODEL
from attnmem_local.memory.memory import Memory

RESULTS = Path(__file__).parent / "results"


def log_probs(case: Case, scorer: Scorer) -> list[np.ndarray]:
    """Per window float32 [n_scored, n_vocab]; closes the scorer."""
    rows = [scorer.log_probs(w.tokens)[w.scored].astype(np.float32) for w in case.windows]
    scorer.close()
    return rows


def open_scorer(case: Case, gguf: Path, prefix=(), memory=(), **options) -> Scorer:
    return Scorer(gguf, prefix, n_live=max(len(w.tokens) for w in case.windows), memory=memory, **options)


@lru_cache(maxsize=2)
def full(case: Case, gguf: Path) -> list[np.ndarray]:
    return log_probs(case, open_scorer(case, gguf, case.prefix.tokens))


def score(case: Case, gguf: Path, prefix=(), memory=(), **options) -> dict[str, float]:
    """kl, nll and top1 (share of positions with the same most likely token) of a run with this prefix or memory."""
    found = log_probs(case, open_scorer(case, gguf, prefix, memory, **options))
    divergence, loss, agree = [], [], []
    for window, p, q in zip(case.windows, full(case, gguf), found):
        divergence.append(kl(p.astype(np.float64), q.astype(np.float64)))
        loss.append(nll(q, window.tokens[window.scored]))
        agree.append(p.argmax(-1) == q.argmax(-1))
    return {
        "kl": float(np.concatenate(divergence).mean()),
        "nll": float(np.concatenate(loss).mean()),
        "top1": float(np.concatenate(agree).mean()),
    }


def score_memory(case: Case, memory: Memory, name: str) -> dict[str, float]:
    """Bytes and score of a memory in llama.cpp on the F32 copy; it is left in build/bench-<name>.mem.gguf."""
    path = memory_path(name)
    memory.save(path)
    return {"bytes": memory.nbytes(), **score(case, f32_model(), memory=path)}


def memory_path(name: str) -> Path:
    return BUILD / f"bench-{name}.mem.gguf"


def record(name: str, result: dict) -> Path:
    """Write a result with its date to results/. Returns the path, for a plot beside it."""
    path = RESULTS / f"{result['date']}-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path


def instructions() -> str:
    """The widest vector instructions that the runtime was compiled for: times depend on them."""
    info = llama_cpp.llama_print_system_info().decode()
    return next((name.lower() for name in ("AVX512", "AVX2", "NEON") if f"{name} = 1" in info), "scalar")


def report(rows: list[dict], as_json: bool, **about) -> None:
    """One JSON object, or a line per row."""
    if as_json:
        click.echo(json.dumps({**about, "rows": rows}))
    else:
        for row in rows:
            click.echo(
                ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
            )


def kv_bytes(case: Case) -> int:
    """Bytes of the F16 KV cache of the prefix."""
    return len(case.prefix.tokens) * _kv_values_per_token() * 2


@lru_cache(maxsize=1)
def _kv_values_per_token() -> int:
    fields = gguf.GGUFReader(DEFAULT_MODEL).fields
    architecture = fields["general.architecture"].contents()
    names = ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv")
    n_layer, n_embd, n_head, n_head_kv = (fields[f"{architecture}.{name}"].contents() for name in names)
    return n_layer * n_head_kv * 2 * (n_embd // n_head)
