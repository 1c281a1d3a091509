// CUDA and ggml-cuda's common.cuh on the CPU, as far as native/ggml/src/ggml-cuda/mem-state.cu needs them
//
// The threads of a block are fibers that run until they wait for one another. Device memory is allocated full of NaN. This tests
// the logic of a kernel without a GPU: indices, sums, synchronisation; neither speed nor memory order.
#pragma once

#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include <ucontext.h>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __align__(n) alignas(n)
#define __shared__ static // blocks run one after another

#define CUDA_CHECK(x)

using std::max;
using std::min;

constexpr int WARP_SIZE = 32;
constexpr int QK8_0     = 32;

using half = ggml_fp16_t;

struct half2  { half x, y; };
struct float2 { float x, y; };
struct int2   { int x, y; };
struct uint2  { uint32_t x, y; };
struct dim3   {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct block_q8_0 {
    half   d;
    int8_t qs[QK8_0];
};

static float    __half2float   (half x)  { return ggml_fp16_to_fp32(x); }
static float2   __half22float2 (half2 x) { return { __half2float(x.x), __half2float(x.y) }; }
static int      __popc         (uint32_t x) { return __builtin_popcount(x); }
static uint32_t __float_as_uint(float x) { uint32_t y; memcpy(&y, &x, sizeof(y)); return y; }

//
// fibers
//

static dim3 threadIdx, blockIdx, blockDim, gridDim;

struct emu_fiber {
    ucontext_t        start;
    jmp_buf           context;
    bool              begun = false;
    bool              done  = false;
    std::vector<char> stack = std::vector<char>(1 << 16);
};

static std::vector<std::unique_ptr<emu_fiber>> emu_fibers;
static emu_fiber           * emu_current;
static ucontext_t            emu_main;
static jmp_buf               emu_scheduler;
static std::function<void()> emu_kernel;

static void emu_yield() {
    if (_setjmp(emu_current->context) == 0) {
        _longjmp(emu_scheduler, 1);
    }
}

static void emu_run() {
    emu_kernel();
    emu_current->done = true;
    _longjmp(emu_scheduler, 1);
}

// a barrier of several threads, and the words that they exchange at it
struct emu_barrier {
    int      n       = 0;
    int      arrived = 0;
    int      turn    = 0;
    uint32_t word[WARP_SIZE];

    void wait() {
        const int before = turn;
        if (++arrived == n) {
            arrived = 0;
            turn++;
        }
        while (turn == before) {
            emu_yield();
        }
    }
};

static emu_barrier emu_block;
static emu_barrier emu_warps[32];

static void emu_launch(const dim3 & grid, const dim3 & block, const std::function<void()> & kernel) {
    emu_kernel = kernel;
    gridDim    = grid;
    blockDim   = block;
    while (emu_fibers.size() < block.x) {
        emu_fibers.push_back(std::make_unique<emu_fiber>());
    }
    for (unsigned b = 0; b < grid.x*grid.y*grid.z; b++) {
        blockIdx  = { b % grid.x, b/grid.x % grid.y, b/grid.x/grid.y };
        emu_block = {};
        emu_block.n = block.x;
        for (unsigned w = 0; w < block.x/WARP_SIZE; w++) {
            emu_warps[w] = {};
            emu_warps[w].n = WARP_SIZE;
        }
        for (unsigned t = 0; t < block.x; t++) {
            emu_fibers[t]->begun = emu_fibers[t]->done = false;
        }
        for (unsigned n_done = 0; n_done < block.x; ) {
            for (unsigned t = 0; t < block.x; t++) {
                emu_current = emu_fibers[t].get();
                if (emu_current->done) {
                    continue;
                }
                threadIdx = { t, 0, 0 };
                if (_setjmp(emu_scheduler) == 0) {
                    if (emu_current->begun) {
                        _longjmp(emu_current->context, 1);
                    }
                    emu_current->begun = true;
                    getcontext(&emu_current->start);
                    emu_current->start.uc_stack.ss_sp   = emu_current->stack.data();
                    emu_current->start.uc_stack.ss_size = emu_current->stack.size();
                    makecontext(&emu_current->start, emu_run, 0);
                    swapcontext(&emu_main, &emu_current->start);
                }
                n_done += emu_current->done;
            }
        }
    }
}

//
// functions of CUDA
//

static void __syncthreads() { emu_block.wait(); }

// exchanges a word among all lanes of the warp
static const uint32_t * emu_exchange(uint32_t mine) {
    emu_barrier & warp = emu_warps[threadIdx.x/WARP_SIZE];
    warp.wait(); // until the words of the previous exchange have been read
    warp.word[threadIdx.x % WARP_SIZE] = mine;
    warp.wait();
    return warp.word;
}

template <typename T>
static T __shfl_xor_sync(uint32_t /*mask*/, T x, int offset) {
    static_assert(sizeof(T) == sizeof(uint32_t), "a word");
    uint32_t mine;
    memcpy(&mine, &x, sizeof(x));
    const uint32_t * words = emu_exchange(mine);
    memcpy(&x, words + ((threadIdx.x % WARP_SIZE) ^ offset), sizeof(x));
    return x;
}

static uint32_t __ballot_sync(uint32_t /*mask*/, bool x) {
    const uint32_t * words = emu_exchange(x);
    uint32_t res = 0;
    for (int i = 0; i < WARP_SIZE; i++) {
        res |= words[i] << i;
    }
    return res;
}

static int atomicAdd(int * to, int x) { return std::exchange(*to, *to + x); }

//
// functions of ggml-cuda
//

static float warp_reduce_sum(float x) {
    for (int offset = WARP_SIZE/2; offset > 0; offset /= 2) {
        x += __shfl_xor_sync(0xFFFFFFFF, x, offset);
    }
    return x;
}

static float warp_reduce_max(float x) {
    for (int offset = WARP_SIZE/2; offset > 0; offset /= 2) {
        x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, offset));
    }
    return x;
}

template <int n>
static void ggml_cuda_memcpy_1(void * to, const void * from) {
    GGML_ASSERT((uintptr_t) to % n == 0 && (uintptr_t) from % n == 0);
    memcpy(to, from, n);
}

static void ggml_cuda_pdl_sync() {}

using cudaStream_t = int;

struct ggml_cuda_kernel_launch_params {
    dim3 grid, block;
    ggml_cuda_kernel_launch_params(const dim3 & grid, const dim3 & block, size_t, cudaStream_t) : grid(grid), block(block) {}
};

template <typename Kernel, typename... Args>
static void ggml_cuda_kernel_launch(Kernel kernel, const ggml_cuda_kernel_launch_params & params, Args... args) {
    emu_launch(params.grid, params.block, [&] { kernel(args...); });
}

struct ggml_cuda_pool {};

template <typename T>
struct ggml_cuda_pool_alloc {
    std::vector<T> data;

    explicit ggml_cuda_pool_alloc(ggml_cuda_pool &) {}
    ggml_cuda_pool_alloc(ggml_cuda_pool &, size_t n) { alloc(n); }

    void alloc(size_t n) {
        data.resize(n);
        memset((void *) data.data(), 0xff, n*sizeof(T));
    }
    T * get() { return data.empty() ? nullptr : data.data(); }
};

struct ggml_backend_cuda_context {
    int device = 0;
    ggml_cuda_pool pool_;

    ggml_cuda_pool & pool() { return pool_; }
    cudaStream_t stream() const { return 0; }
};

struct ggml_cuda_device_info {
    struct { int nsm = 16; } devices[1]; // few, and yet more than one share of the rows for small tables
};

static const ggml_cuda_device_info & ggml_cuda_info() {
    static const ggml_cuda_device_info info;
    return info;
}

#include "ggml-impl.h"
