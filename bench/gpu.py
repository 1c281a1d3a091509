"""What memories cost on a GPU; see bench/gpu.sh, which runs this.

Results are kept in build/gpu row by row, so that a stage that was cut off goes on where it was, and one that is done is not
run again; `build` begins anew when the sources have changed, and so does what was measured with them. If OUT is set in the
environment, results are copied there as well.
"""

import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from unittest.mock import patch

import click
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
TREE = ROOT / "build/gpu-tree"
RESULTS = Path(__file__).parent / "results"
STAGES = ("check", "attention", "decode", "builder")
PROGRAMS = ("tests/native/mem-state.cpp", "bench/gpu-attention.cpp")
TIMEOUT = 560  # seconds of one program; the machine may stop a command after ten minutes


@dataclass(frozen=True)
class Sizes:
    prefixes: tuple[int, ...] = (8192, 32768, 131072)  # tokens
    entries: tuple[int, ...] = (1024, 4096, 16384, 65536)  # per KV head
    batches: tuple[int, ...] = (1, 8, 32)  # sequences
    builder_prefixes: tuple[int, ...] = (8192, 32768)
    builder_windows: int = 24
    n_live: int = 32
    n_steps: int = 64
    n_ubatch: int = 2048


TINY = Sizes((256, 512), (64, 256), (1, 4), (256,), 2, 32, 4, 256)


class Run:
    """Where a run is: on which device, in which size, and the folder of its results."""

    def __init__(self, cpu: bool, tiny: bool):
        self.device, self.tiny = "cpu" if cpu else "gpu", tiny
        self.sizes = TINY if tiny else Sizes()
        self.folder = ROOT / "build" / f"gpu{'-cpu' if cpu else ''}{'-tiny' if tiny else ''}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.cmake = ROOT / "build" / f"gpu{'-cpu' if cpu else ''}" / "cmake"
        self.libraries = Path(os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(self.cmake / "bin")))  # llama_cpp reads it

    def shape(self):
        import shapes  # which needs what is in the tree

        return shapes.TINY if self.tiny else shapes.LLAMA_8B

    def program(self, source: Path) -> Path:
        """Compiled against the libraries of this run."""
        program = self.folder / source.stem
        options = ["-std=c++17", "-O2", "-I", TREE / "ggml/include", "-L", self.libraries, f"-Wl,-rpath,{self.libraries}"]
        subprocess.run(
            [os.environ.get("CXX", "c++"), source, "-o", program, *options, "-lggml", "-lggml-cpu", "-lggml-base"], check=True
        )
        return program


class Rows:
    """The rows of a stage, in a file that is written after each."""

    def __init__(self, run: Run, stage: str):
        self.path = run.folder / f"{stage}.json"
        self.about = {"stage": stage, "tree": digest(), "hardware": hardware(run), "tiny": run.tiny}
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        same = all(found.get(key) == value for key, value in self.about.items())
        self.rows, self.done = (found["rows"], found["done"]) if same else ([], False)

    def has(self, **key) -> bool:
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, **row) -> None:
        shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items() if name != "output"}
        click.echo(", ".join(f"{name} {value}" for name, value in shown.items()))
        self.rows.append(row)
        self._write()

    def finish(self) -> None:
        self.done = True
        self._write()

    def _write(self) -> None:
        result = {**self.about, "date": date.today().isoformat(), "done": self.done, "rows": self.rows}
        self.path.write_text(json.dumps(result, indent=2) + "\n")
        if out := os.environ.get("OUT"):
            shutil.copy(self.path, out)


def digest() -> str:
    """Of the sources that are built."""
    value = hashlib.blake2b(b"".join((ROOT / name).read_bytes() for name in PROGRAMS), digest_size=8)
    for path in sorted(p for p in TREE.rglob("*") if p.is_file() and "python" not in p.relative_to(TREE).parts):
        value.update(path.relative_to(TREE).as_posix().encode() + path.read_bytes())
    return value.hexdigest()


def hardware(run: Run) -> str:
    if run.device == "cpu":
        return platform.machine()
    return output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()[0]


def output(*command) -> str:
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT).stdout.strip()


@click.group(help=__doc__)
def main() -> None: ...


def stage(function):
    """A command that is given its run and its rows, unless it is done."""

    @click.option("--cpu", is_flag=True, help="Without a GPU.")
    @click.option("--tiny", is_flag=True, help="In a size that shows only whether it works.")
    def command(cpu: bool, tiny: bool) -> None:
        run = Run(cpu, tiny)
        rows = Rows(run, function.__name__)
        if rows.done:
            click.echo(f"{function.__name__} is done: {rows.path}")
            return
        start = time.monotonic()
        function(run, rows)
        rows.finish()
        click.echo(f"{function.__name__}: {time.monotonic() - start:.0f} s")

    return main.command(function.__name__)(command)


@stage
def build(run: Run, rows: Rows) -> None:
    off = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")]
    cuda = cuda_options() if run.device == "gpu" else ["-DGGML_CUDA=OFF"]
    subprocess.run(["cmake", "-S", TREE, "-B", run.cmake, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *off, *cuda], check=True)
    try:
        subprocess.run(["ninja", "-C", run.cmake, "llama"], check=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise click.ClickException("not all is compiled yet; run it again to go on") from None


def cuda_options() -> list[str]:
    """For the GPU that is here. Where the toolkit lacks them: cuBLAS of a wheel, such as comes with torch, and the driver itself."""
    capability = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").splitlines()[0]
    options = ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={capability.replace('.', '')}"]
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-E", "-"], input="", text=True, capture_output=True, check=True)
    toolkit = Path(next(line.split("TOP=")[1] for line in dry.stderr.splitlines() if "TOP=" in line)).resolve()
    options += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_BUILD_RPATH={toolkit}/lib64"]
    if not any(toolkit.rglob("libcuda.so")):
        driver = next((line.split()[-1] for line in output("ldconfig", "-p").splitlines() if "libcuda.so.1 " in line), None)
        options.append(f"-DCUDA_cuda_driver_LIBRARY={driver}" if driver else "-DGGML_CUDA_NO_VMM=ON")
    asked = subprocess.run(
        [nvcc, "-x", "cu", "-E", "-"], input="#include <cublas_v2.h>", text=True, capture_output=True, check=False
    )
    if asked.returncode:
        folders = [Path(p) / "nvidia" / name for p in sys.path for name in ("cu13", "cublas")]
        found = [f for f in folders if (f / "include/cublas_v2.h").exists()]
        if not found:
            raise click.ClickException(f"no cuBLAS: neither nvcc nor any python package has cublas_v2.h\n{asked.stderr}")
        options.append(f"-DCMAKE_CUDA_FLAGS=-I{found[0]}/include")
        options += [f"-DCUDA_{name}_LIBRARY={next((found[0] / 'lib').glob(f'lib{name}.so.*'))}" for name in ("cublas", "cublasLt")]
    return options


@stage
def check(run: Run, rows: Rows) -> None:
    program = run.program(ROOT / "tests/native/mem-state.cpp")
    # the sanitizer is slow, so it sees few of the cases
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    memcheck = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", program, run.device, "10"]
    commands = {"ops": [program, run.device, "1"], "memcheck": memcheck}
    if run.device == "cpu" or not Path(sanitizer).exists():
        click.echo("memcheck is left out: no compute-sanitizer")
        del commands["memcheck"]
    for what, command in commands.items():
        if rows.has(what=what, ok=True):
            continue
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIMEOUT, check=False)
        click.echo(done.stdout)
        rows.add(what=what, ok=done.returncode == 0, output=done.stdout[-6000:])
        if done.returncode:
            raise click.ClickException(f"{what} failed with {done.returncode}")
    for flash_attn in (False, True):
        what = f"model with{'' if flash_attn else 'out'} flash attention"
        if not rows.has(what=what, ok=True):
            none, memory = difference_to_cpu(run, flash_attn)
            ok = memory < 2 * none + 1e-3
            rows.add(what=what, ok=ok, kl_none=none, kl_memory=memory)
            if not ok:
                raise click.ClickException(f"the {what} gives something else than on the CPU")


def difference_to_cpu(run: Run, flash_attn: bool) -> list[float]:
    """KL of a small model on the device to the same on the CPU, without and with a memory: the worst over sizes of a batch."""
    import gguf
    from shapes import Shape, anchor_memory, model_spec, write_llama

    from attnmem_local.evaluate.scorer import Scorer, kl

    model, path = run.folder / "check.gguf", run.folder / "check.mem.gguf"
    write_llama(model, Shape(2, 256, 512, 4, 2, 64, 2048))
    sizes = np.array([[700, 0], [3, 90]])  # anchors, none of which can be taken for another
    anchor_memory(model_spec(gguf.GGUFReader(model)), sizes, 1024).save(path)
    tokens = np.random.default_rng(0).integers(300, 2048, 64).tolist()
    worst = []
    for memory in ((), path):
        differences = []
        for n_batch in (1, 2, 16, 17, 64):  # matrix products have other kernels for few tokens
            options = {"memory": memory, "n_batch": n_batch, "flash_attn": flash_attn, "op_offload": False}
            layers = (0, 0 if run.device == "cpu" else -1)
            cpu, device = (Scorer(model, n_gpu_layers=n, **options).log_probs(tokens) for n in layers)
            differences.append(float(kl(cpu, device).mean()))
        worst.append(max(differences))
    return worst


@stage
def attention(run: Run, rows: Rows) -> None:
    program = run.program(ROOT / "bench/gpu-attention.cpp")
    shape = run.shape()
    if not rows.has(what="copy"):
        rows.add(what="copy", gb_per_s=float(output(program, run.device, "copy")))
    bandwidth = next(row["gb_per_s"] for row in rows.rows if row["what"] == "copy")
    for what, sizes in (("none", (0,)), ("prefix", run.sizes.prefixes), ("memory", run.sizes.entries)):
        for n in sizes:
            for batch in run.sizes.batches:
                key = {"what": what, "n": n, "batch": batch}
                if rows.has(**key):
                    continue
                command = [program, run.device, "prefix" if what == "none" else what, n, batch]
                us = float(output(*command, shape.n_layer, shape.n_head, shape.n_head_kv, shape.d))
                nbytes = attention_bytes(shape, what, n, batch)
                rows.add(**key, us_per_layer=us, bytes=nbytes, share_of_bandwidth=nbytes / us / 1e3 / bandwidth)


def attention_bytes(shape, what: str, n: int, batch: int) -> int:
    """That one layer has to read for the prefix or the memory: all keys and values, or what a search reads."""
    from shapes import MIN_ENTRIES, n_probe

    from attnmem_local.builder.search.lists import n_lists

    row = 2 * shape.d
    if what == "prefix":
        return shape.n_head_kv * n * 2 * row
    if what == "memory" and n < MIN_ENTRIES:  # a scan reads all keys and biases, a query one value
        return shape.n_head_kv * n * (row + 4) + shape.n_head * batch * row
    if what == "memory":  # the means of all lists, and for each query the keys of some; no row is counted twice
        searched = min(n, shape.n_head // shape.n_head_kv * batch * n_probe(n) * n / n_lists(n))
        return int(shape.n_head_kv * (n_lists(n) + searched) * (row + 4)) + shape.n_head * batch * row
    return 0


@stage
def decode(run: Run, rows: Rows) -> None:
    import gguf
    from shapes import lookup_memory, model_spec, write_llama

    model = run.folder / "model.gguf"
    shape = run.shape()
    if not model.exists():
        part = model.with_suffix(".part")
        write_llama(part, shape)
        part.rename(model)
    spec = model_spec(gguf.GGUFReader(model))
    decoder = Decoder(run, model)
    kv_bytes = 2 * 2 * shape.n_head_kv * shape.d * shape.n_layer  # per token

    def measure(what: str, n: int, nbytes: Callable[[int], int]) -> None:
        for batch in run.sizes.batches:
            if not rows.has(what=what, n=n, batch=batch):
                ms = decoder.ms_per_step(batch)
                rows.add(what=what, n=n, batch=batch, ms_per_step=ms, bytes=model.stat().st_size + nbytes(batch))

    measure("none", 0, lambda batch: 0)
    for n in run.sizes.entries:
        if all(rows.has(what="memory", n=n, batch=batch) for batch in run.sizes.batches):
            continue
        path = run.folder / "memory.mem.gguf"
        lookup_memory(spec, n).save(path)
        decoder.llama.attach(path)
        measure("memory", n, lambda batch: shape.n_layer * attention_bytes(shape, "memory", n, batch))
        decoder.llama.detach()
        path.unlink()
    for n in run.sizes.prefixes:
        decoder.extend_prefix(n)
        measure("prefix", n, lambda batch: n * kv_bytes)


class Decoder:
    """A model that decodes batches of sequences, which share a prefix of random tokens."""

    def __init__(self, run: Run, model: Path):
        import llama_cpp.llama_cpp as api

        from attnmem_local.runtime.llama import MemoryLlama

        self.api, self.sizes = api, run.sizes
        params = api.llama_context_default_params()
        params.n_seq_max, params.kv_unified = max(run.sizes.batches), True
        with patch.object(api, "llama_context_default_params", return_value=params):
            self.llama = MemoryLlama(
                str(model),
                n_ctx=max(run.sizes.prefixes) + max(run.sizes.batches) * (run.sizes.n_live + run.sizes.n_steps),
                n_batch=run.sizes.n_ubatch,
                n_ubatch=run.sizes.n_ubatch,
                n_gpu_layers=0 if run.device == "cpu" else -1,
                flash_attn=True,
                verbose=False,
            )
        self.kv = api.llama_get_memory(self.llama.ctx)
        self.batch = api.llama_batch_init(run.sizes.n_ubatch, 0, 1)
        self.n_prefix = 0
        self.random = np.random.default_rng(0)

    def run(self, cells: list[tuple[int, int]], logits: bool) -> float:
        """Seconds for random tokens at (sequence, position)."""
        batch = self.batch
        batch.n_tokens = len(cells)
        for i, (sequence, position) in enumerate(cells):
            batch.token[i] = int(self.random.integers(300, self.llama.n_vocab()))
            batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = position, 1, sequence, logits
        start = time.perf_counter()
        if code := self.api.llama_decode(self.llama.ctx, batch):
            raise RuntimeError(f"llama_decode failed with {code}")
        self.api.llama_synchronize(self.llama.ctx)
        return time.perf_counter() - start

    def extend_prefix(self, n: int) -> None:
        while self.n_prefix < n:
            end = min(self.n_prefix + self.sizes.n_ubatch, n)
            self.run([(0, position) for position in range(self.n_prefix, end)], logits=False)
            self.n_prefix = end

    def ms_per_step(self, n_sequences: int) -> float:
        """Median over steps in which each sequence is given one token."""
        for sequence in range(1, n_sequences):
            self.api.llama_memory_seq_cp(self.kv, 0, sequence, 0, self.n_prefix)
        for sequence in range(n_sequences):
            self.run([(sequence, self.n_prefix + i) for i in range(self.sizes.n_live)], logits=False)
        first = self.n_prefix + self.sizes.n_live
        seconds = [
            self.run([(sequence, position) for sequence in range(n_sequences)], logits=True)
            for position in range(first, first + self.sizes.n_steps)
        ]
        for sequence in range(n_sequences):
            self.api.llama_memory_seq_rm(self.kv, sequence, self.n_prefix if sequence == 0 else 0, -1)
        return 1000 * statistics.median(seconds)


@stage
def builder(run: Run, rows: Rows) -> None:
    import tempfile

    import torch

    from attnmem_local.builder.build import build_memory
    from attnmem_local.builder.progress import Progress
    from attnmem_local.memory.prefix import Prefix

    device = "cpu" if run.device == "cpu" else "cuda"
    model = random_model(run, device)
    for n in run.sizes.builder_prefixes:
        if rows.has(prefix_tokens=n):
            continue
        tokens = np.random.default_rng(n).integers(300, run.shape().n_vocab, n).tolist()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        progress = Progress()
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, XDG_CACHE_HOME=cache):  # sensitivities are measured
            memory = build_memory(model, Prefix(tokens, "random"), windows=run.sizes.builder_windows, progress=progress)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
        seconds = time.monotonic() - start
        rows.add(prefix_tokens=n, seconds=seconds, peak_bytes=peak, memory_bytes=memory.nbytes(), stages=progress.seconds)


def random_model(run: Run, device: str):
    """A BuildModel of random weights; its text is random as well."""
    import torch
    import transformers

    from attnmem_local.builder.attention import ATTENTION_NAME
    from attnmem_local.builder.model import BuildModel, _spec

    shape = run.shape()
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

    class Tokenizer:
        def encode(self, text: str, add_bos: bool) -> list[int]:
            return np.random.default_rng(len(text)).integers(300, shape.n_vocab, 16).tolist()

        def decode(self, tokens: list[int]) -> str:
            return ""

    spec = _spec(config, norms="random", vocab="random")
    return BuildModel(module.to(device).eval().requires_grad_(False), Tokenizer(), spec, interleaved=True)


def results(folder: Path) -> dict[str, dict]:
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in STAGES if (folder / f"{name}.json").exists()}


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path), default=ROOT / "build/gpu")
def table(folder: Path) -> None:
    """What is in FOLDER."""
    found = results(folder)
    bandwidth = next((row["gb_per_s"] for row in found.get("attention", {}).get("rows", []) if row["what"] == "copy"), None)
    if bandwidth:
        click.echo(f"a copy on the device: {bandwidth:.0f} GB/s")
    shown = Table(title=f"memories on {', '.join({result['hardware'] for result in found.values()})}")
    for title in ("what", "tokens or entries", "batch", "attention, µs per layer", "of bandwidth", "ms per step", "of bandwidth"):
        shown.add_column(title, justify="left" if title == "what" else "right")
    rows = {
        name: {(r["what"], r["n"], r["batch"]): r for r in found.get(name, {}).get("rows", []) if "n" in r} for name in STAGES[1:3]
    }
    for key in dict.fromkeys([*rows["attention"], *rows["decode"]]):
        a, d = rows["attention"].get(key), rows["decode"].get(key)
        cells = [f"{a['us_per_layer']:.1f}", f"{a['share_of_bandwidth']:.0%}"] if a else ["", ""]
        cells += (
            [f"{d['ms_per_step']:.2f}", f"{d['bytes'] / d['ms_per_step'] / 1e6 / bandwidth:.0%}" if bandwidth else ""]
            if d
            else ["", ""]
        )
        shown.add_row(*map(str, key), *cells)
    Console(width=120).print(shown)
    for row in found.get("builder", {}).get("rows", []):
        stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in row["stages"].items())
        click.echo(
            f"builder, {row['prefix_tokens']} tokens: {row['seconds']:.0f} s, {row['peak_bytes'] / 1e9:.1f} GB at most ({stages})"
        )
    for row in found.get("check", {}).get("rows", []):
        click.echo(f"{row['what']}: {'ok' if row['ok'] else 'FAILED'}")


@main.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path), default=ROOT / "build/gpu")
def record(folder: Path) -> None:
    """Copy what is in FOLDER to bench/results/."""
    found = results(folder)
    if not found:
        raise click.ClickException(f"there is nothing in {folder}")
    newest = max(found.values(), key=lambda result: result["date"])
    if newest["tiny"]:
        raise click.ClickException("these are no measurements, but of a tiny size")
    name = f"{newest['date']}-gpu-{newest['hardware'].lower().replace(' ', '-')}.json"
    (RESULTS / name).write_text(json.dumps(found, indent=2) + "\n")
    click.echo(RESULTS / name)


if __name__ == "__main__":
    main()
