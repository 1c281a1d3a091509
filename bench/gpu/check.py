"""Whether the device computes what it should: the ops against sums in double precision, a small model against the CPU."""

import shutil
import subprocess
from pathlib import Path

import click
import numpy as np

from ..common.paths import ROOT
from .run import TIMEOUT, Rows, Run, stage


@stage
def main(run: Run, rows: Rows) -> None:
    """The ops against sums in double precision, under compute-sanitizer too; a small model against the CPU."""
    program = run.program(ROOT / "tests/native/mem-state.cpp")
    # the sanitizer is slow: it sees one case in ten
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
                raise click.ClickException(f"the {what} gives other results than on the CPU")


def difference_to_cpu(run: Run, flash_attn: bool) -> list[float]:
    """KL of a small model on the device to the same on the CPU, without and with a memory; the worst over batch sizes."""
    import gguf

    from attnmem_local.evaluate.scorer import Scorer, kl

    from ..common.shapes import Shape, anchor_memory, model_spec, write_llama

    model, path = run.folder / "check.gguf", run.folder / "check.mem.gguf"
    write_llama(model, Shape(2, 256, 512, 4, 2, 64, 2048))
    sizes = np.array([[700, 0], [3, 90]])  # anchors: nothing is looked up, so no near tie can decide otherwise
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
