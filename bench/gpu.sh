#!/usr/bin/env bash
# Memories on a GPU: correctness, ms per token, the attention part alone, the builder.
#
#   bench/gpu.sh pack       here, after ./build.sh: what a machine with a GPU and no network needs, into build/gpu-tree
#   bench/gpu.sh build      there: llama.cpp with CUDA. A stage that was cut off resumes when called again
#   bench/gpu.sh check      the ops against sums in double precision, and under compute-sanitizer
#   bench/gpu.sh attention  µs per layer, and the bandwidth of a copy on the device
#   bench/gpu.sh decode     ms per token of random weights with the shape of Llama-3.1-8B in Q4_0
#   bench/gpu.sh builder    seconds and device memory of building for prefixes of 8K and 32K tokens
#   bench/gpu.sh table      what has been measured
#   bench/gpu.sh record     the same, into bench/results/
#
# --cpu --quick after a stage from build to builder tries it on a machine without a GPU; `table build/gpu-cpu-quick` shows the results.
# Needed there: python with torch, transformers and numpy, cmake, ninja, a C++ compiler and nvcc; pack brings the rest, of which
# hnswlib (for builder) needs the same version of python.
set -euo pipefail
cd "$(dirname "$0")/.."

pack() {
    local from=build/tree/vendor/llama.cpp to=build/gpu-tree packages
    [ -d $from ] || { echo "gpu.sh: $from does not exist; run ./build.sh first" >&2; exit 1; }
    rm -rf $to
    mkdir -p $to/python
    (cd $from && tar c CMakeLists.txt LICENSE cmake include src vendor ggml/CMakeLists.txt ggml/cmake ggml/include \
        ggml/src/CMakeLists.txt ggml/src/*.{c,cpp,h,in} ggml/src/ggml-{cpu,cuda}) | tar x -C $to
    packages=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    (cd "$packages" && tar c --exclude __pycache__ --exclude llama_cpp/lib attnmem_local-*.dist-info \
        click diskcache gguf hnswlib*.so llama_cpp markdown_it mdurl platformdirs pygments rich) | tar x -C $to/python
    du -sh $to
}

# The CMAKE_ARGS of ./build.sh --cuda for the GPU of this machine. There is no network: cuBLAS comes from an installed wheel, such as
# torch brings.
use_cuda_here() {
    PATH=$PATH:/usr/local/cuda/bin
    source ./build.sh
    fetch_cublas() {
        local folder
        folder=$($python -c 'import sys; print(*(f"{p}/nvidia/cu13" for p in sys.path), sep="\n")' |
            while read -r f; do [ ! -e "$f/include/cublas_v2.h" ] || echo "$f"; done | head -n 1)
        [ -n "$folder" ] || die "no cuBLAS: neither nvcc nor a python package has cublas_v2.h"
        mkdir -p build/cublas/nvidia
        ln -sfn "$folder" build/cublas/nvidia/cu13
    }
    need_cuda native
    use_cuda native
    export CMAKE_ARGS
}

if [ "${1:-}" = pack ]; then pack; exit; fi
[ -d build/gpu-tree ] || { echo "gpu.sh: build/gpu-tree does not exist; run bench/gpu.sh pack where ./build.sh has run" >&2; exit 1; }

python=.venv/bin/python
[ -x $python ] || python=python3
export PYTHONPATH=$PWD:$PWD/build/gpu-tree/python
if [ "${1:-}" = build ] && [[ " $* " != *" --cpu "* ]]; then use_cuda_here; fi
exec $python -m bench gpu "$@"
