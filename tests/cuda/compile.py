"""Compiles the CUDA files of llama.cpp that patches/ and native/ touch; needs no GPU. `./build.sh check-cuda` runs it.

    python tests/cuda/compile.py TREE BUILD

TREE: the patched llama.cpp. BUILD: the folder that cmake has configured for it, with CUDA and ninja.
A touched .cu file is compiled; so is every .cu file that includes a touched header, directly or not. Of the many template
instances only INSTANCES are compiled, a small and a large one of each kernel. It is an error if nothing that is compiled
includes a touched file.
"""

import os
import re
import subprocess
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]
FOLDER = "ggml/src/ggml-cuda"
INSTANCES = (
    "fattn-vec-instance-f16-f16.cu",
    "fattn-vec-instance-q8_0-q8_0.cu",
    "fattn-tile-instance-dkq64-dv64.cu",
    "fattn-tile-instance-dkq128-dv128.cu",
    "fattn-mma-f16-instance-ncols1_1-ncols2_8.cu",
    "fattn-mma-f16-instance-ncols1_8-ncols2_1.cu",
    "fattn-mma-f16-instance-ncols1_64-ncols2_1.cu",
)


def touched() -> set[str]:
    """The touched files below FOLDER, relative to it."""
    patches = (ROOT / "patches").glob("*.patch")
    names = {name for patch in patches for name in re.findall(r"^\+\+\+ b/(\S+)", patch.read_text(encoding="utf-8"), re.M)}
    names |= {path.relative_to(ROOT / "native").as_posix() for path in (ROOT / "native").rglob("*") if path.is_file()}
    return {name.removeprefix(FOLDER + "/") for name in names if name.startswith(FOLDER + "/")}


def included(path: Path, headers: dict[str, Path]) -> set[Path]:
    """The headers of FOLDER that a file includes, directly or not; no two of them have the same name."""
    res, todo = set(), [path]
    while todo:
        text = todo.pop().read_text(encoding="utf-8")
        new = {headers[Path(name).name] for name in re.findall(r'^\s*#include "([^"]+)"', text, re.M) if Path(name).name in headers}
        todo += new - res
        res |= new
    return res


@click.command()
@click.argument("tree", type=click.Path(exists=True, path_type=Path))
@click.argument("build", type=click.Path(exists=True, path_type=Path))
def main(tree: Path, build: Path) -> None:
    folder = tree / FOLDER
    changed = {folder / name for name in touched()}
    headers = {path.name: path for path in folder.rglob("*.*h")}
    compiled, covered = [], {folder / "CMakeLists.txt"}  # cmake has run it
    for path in sorted(folder.rglob("*.cu")):
        files = {path} | included(path, headers)
        chosen = path.parent == folder or path.name in INSTANCES or path in changed
        if chosen and files & changed:
            compiled.append(path.relative_to(folder).as_posix())
            covered |= files
    if left := changed - covered:
        raise click.ClickException(f"touched, but nothing that is compiled includes it: {', '.join(sorted(map(str, left)))}")
    click.echo(f"{len(changed)} CUDA files are touched; compiling {len(compiled)}: {', '.join(compiled)}")
    if compiled:
        objects = [f"{FOLDER}/CMakeFiles/ggml-cuda.dir/{name}.o" for name in compiled]
        raise SystemExit(subprocess.run(["ninja", "-C", build, f"-j{os.cpu_count()}", *objects], check=False).returncode)


if __name__ == "__main__":
    main()
