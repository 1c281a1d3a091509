"""The checks of one file: both readers, and if they accept it, its states, and logits with every lookup."""

import hashlib
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from test_parity import reference_states

from attnmem_local.engine import native
from attnmem_local.evaluate.scorer import Scorer
from attnmem_local.memory.entries import KINDS
from attnmem_local.memory.errors import MemoryRefused, Unsupported
from attnmem_local.memory.memory import Memory
from attnmem_local.memory.tables import rows
from attnmem_local.memory.writer import tensors
from attnmem_local.runtime.loaded import LoadedMemory

from .bases import Base

MAX_SECONDS = 1.0  # CPU time of a reader
MAX_BYTES = 100e6  # RAM of a reader, beyond the size of the file
TOLERANCE = 0.05  # difference of logits, whose standard deviation is about 1
TOKENS = [300, 417, 522, 333, 888, 611]  # decoded as a batch of four, then one by one


class Checker:
    """The models and contexts that files are tried with, reused from file to file."""

    def __init__(self, bases: list[Base], folder: Path):
        torch.set_num_threads(1)
        self.bases = bases
        self.path = folder / "file.mem.gguf"
        self.scorers = {
            (model, flash): Scorer(model, n_live=16, flash_attn=flash, n_threads=1, n_threads_batch=1)
            for model in {base.model for base in bases}
            for flash in (False, True)
        }
        self.decoded: set[bytes] = set()

    def check(self, content: bytes, base: Base) -> tuple[dict[str, str], list[str]]:
        """The outcome of each stage by name, and all failures."""
        self.path.write_bytes(content)
        failures: list[str] = []
        llama = self.scorers[base.model, False].llama
        memory, python = self._read("python", lambda: _load(self.path), failures)
        loaded, runtime = self._read("native", lambda: LoadedMemory(llama._model, self.path), failures)
        fits = memory is not None and _fits(memory, base)
        if fits != (loaded is not None):
            reason = "" if memory is None or fits else ", for another model"
            failures.append(f"disagreement: python says {python}, native {runtime}{reason}")
        outcome = {"python": python.split(":")[0], "native": runtime.split(":")[0]}
        if memory is not None and loaded is not None:
            outcome["decode"] = self._use(memory, loaded, base, failures)
        return outcome, failures

    def _read(self, reader: str, read, failures: list[str]):
        """The memory that a reader returns, or None, and its decision. Adds its failures."""
        before, start = _reset_peak(), time.process_time()
        result, decision = None, "accepted"
        try:
            result = read()
        except MemoryRefused as error:
            decision = f"{error.reason}: {error}"
        except Exception as error:
            decision = f"traceback: {error!r}"
            failures.append(f"{reader} ends in {decision}")
        if (seconds := time.process_time() - start) > MAX_SECONDS:
            failures.append(f"{reader} takes {seconds:.1f} s")
        if (nbytes := _peak() - before - self.path.stat().st_size) > MAX_BYTES:
            failures.append(f"{reader} takes {nbytes / 1e6:.0f} MB")
        return result, decision

    def _use(self, memory: Memory, loaded: LoadedMemory, base: Base, failures: list[str]) -> str:
        """Compare both readers, the states and the logits of every lookup. Returns the outcome and adds failures."""
        if loaded.prefix_tokens != memory.prefix_tokens or loaded.metadata("attnmem.prefix.text") != memory.prefix_text:
            failures.append("the readers see different prefixes")
        if loaded.prefix_messages != memory.prefix_messages:
            failures.append("the readers see different messages")
        key = _key(memory)
        if key in self.decoded:
            return "as before"
        self.decoded.add(key)
        self._check_states(memory, loaded, failures)
        logits = {}
        for flash in (False, True):
            scorer = self.scorers[base.model, flash]
            attached = LoadedMemory(scorer.llama._model, self.path) if flash else loaded
            for lookup in native.LOOKUPS:
                # in a new thread, as each thread keeps its search buffers
                thread = threading.Thread(target=lambda: logits.update({(flash, lookup): _logits(scorer, attached, lookup)}))
                thread.start()
                thread.join()
            scorer.llama.detach()
        refused = [x for x in logits.values() if isinstance(x, Unsupported)]
        if refused and len(refused) == len(logits):
            return "attach refused"
        for (flash, lookup), x in logits.items():
            if isinstance(x, Exception):
                failures.append(f"{lookup}, flash attention {flash}: {x!r}")
            elif not np.isfinite(x).all():
                failures.append(f"{lookup}, flash attention {flash}: logits are not finite")
        if not failures:
            reference = logits[False, "stock"]
            paths = (True, "stock"), (False, "scan"), (True, "scan")
            differences = {path: float(np.abs(logits[path] - reference).max()) for path in paths}
            if max(differences.values()) > TOLERANCE:
                if self._is_near_tie(memory, base, reference):
                    return "near tie"
                failures.append(f"logits differ from those of stock without flash attention: {differences}")
        return "decoded"

    def _check_states(self, memory: Memory, loaded: LoadedMemory, failures: list[str]) -> None:
        """Compare the op with the reference, except for states that a memory changed by rounding would not reproduce."""
        q = 2 * np.random.default_rng(3).standard_normal((4, memory.model.head_count, memory.model.key_length)).astype(np.float32)
        for layer in sorted(
            {il for layers in memory.layers for il, layer in layers.items() if any(len(e.key) for e in _entries(layer))}
        ):
            expected = reference_states(memory, layer, q)
            others = [reference_states(_jittered(memory, seed, 1e-4), layer, q) for seed in (0, 1)]
            stable = np.all([_close(other, expected) for other in others], axis=0)
            states = native.state(loaded.handle, layer, q, "scan")
            if not np.isfinite(states[..., :-1]).all():
                failures.append(f"states of layer {layer} are not finite")
            elif not (_close(states, expected) | ~stable).all():
                failures.append(
                    f"states of layer {layer} differ from the reference by up to {np.abs(states - expected)[stable].max():.3g}"
                )

    def _is_near_tie(self, memory: Memory, base: Base, logits: np.ndarray) -> bool:
        """Whether memories that differ by rounding also give other logits."""
        scorer = self.scorers[base.model, False]
        path = self.path.with_name("jittered.mem.gguf")
        for seed in range(4):
            _jittered(memory, seed, 1e-2 if base.name == "quantized" else 1e-3).save(path)
            other = LoadedMemory(scorer.llama._model, path)
            results = [_logits(scorer, other, lookup) for lookup in ("stock", "scan")]
            scorer.llama.detach()
            if max(np.abs(x - logits).max() for x in results) > TOLERANCE / 2:
                return True
        return False


def _logits(scorer: Scorer, memory: LoadedMemory, lookup: str) -> np.ndarray | Exception:
    """Logits of TOKENS, float32 [n_tokens, n_vocab], or the exception that was raised."""
    llama = scorer.llama
    try:
        llama.detach()
        llama.set_lookup(lookup)
        llama.attach(memory)
        llama._ctx.kv_cache_seq_rm(-1, 0, -1)
        rows = []
        for first, batch in ((0, TOKENS[:4]), (4, TOKENS[4:5]), (5, TOKENS[5:])):
            llama._batch.set_batch(batch=batch, n_past=first, logits_all=True)
            llama._ctx.decode(llama._batch)
            rows.append(np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(len(batch), llama.n_vocab())).copy())
        return np.concatenate(rows)
    except Exception as error:
        return error


def _load(path: Path) -> Memory:
    memory = Memory.load(path)
    memory.n_entries("anchor")  # as `attnmem show` does
    return memory


def _fits(memory: Memory, base: Base) -> bool:
    """Whether a memory belongs to the base's model. Scale and RoPE are ignored, as they are checked when it is attached."""
    other = replace(base.spec, **{name: getattr(memory.model, name) for name in ("scale", "rope_freq_base", "rope_freq_scale")})
    return memory.model == other and max(memory.prefix_tokens, default=0) < base.n_vocab


def _entries(layer):
    return [e for kind in KINDS if (e := getattr(layer, kind.name)) is not None]


def _key(memory: Memory) -> bytes:
    """A hash of everything that the runtime computes with."""
    hash = hashlib.blake2b(repr((asdict(memory.model), memory.token_top_k)).encode(), digest_size=16)
    for name, array in tensors(memory):
        hash.update(f"{name} {array.dtype} {array.shape}".encode())
        hash.update(np.ascontiguousarray(array))
    return hash.digest()


def _close(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether each state is close, bool [...], for states [..., d_v + 1]."""
    with np.errstate(invalid="ignore"):  # both may be the empty state
        o = np.abs(a - b)[..., :-1].max(-1) <= 1e-3 * np.abs(b[..., :-1]).max(-1) + 1e-4
        lse = (a[..., -1] == b[..., -1]) | (np.abs(a - b)[..., -1] <= 1e-3 * np.abs(b[..., -1]) + 1e-3)
    return o & lse


def _jittered(memory: Memory, seed: int, size: float) -> Memory:
    """The memory with random errors added to its scores, as if by rounding; size: their size relative to the terms of a score."""
    rng = np.random.default_rng(seed)

    def entries(e):
        noise = (
            size * (np.abs(e.bias) + 4 * np.linalg.norm(rows(e.key).astype(np.float64), axis=-1)) * rng.standard_normal(len(e.bias))
        )
        return replace(e, bias=np.clip(e.bias + noise, -1e15, 1e15).astype(np.float32))

    def layer(x):
        return replace(x, **{kind.name: entries(e) for kind in KINDS if (e := getattr(x, kind.name)) is not None})

    return replace(memory, layers=[{il: layer(x) for il, x in layers.items()} for layers in memory.layers])


def _reset_peak() -> int:
    """Resident memory of this process in bytes, from which _peak counts on; 0 if the system has no such counter."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _peak()


def _peak() -> int:
    """The largest resident memory since _reset_peak, in bytes; 0 if the system has no such counter."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
