// Rows of a table of a memory, read in place: F32, F16 or Q8_0
#pragma once

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "mem-vec.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ops.h"

#include <cstdint>
#include <type_traits>

constexpr int64_t MEM_TILE_ROWS = 64;

// localities of __builtin_prefetch
constexpr int MEM_CACHE_L1 = 3;
constexpr int MEM_CACHE_L2 = 2;

#if defined(__GNUC__)
#define MEM_ALWAYS_INLINE static inline __attribute__((always_inline))
#define MEM_NEVER_INLINE __attribute__((noinline))
#else
#define MEM_ALWAYS_INLINE static inline
#define MEM_NEVER_INLINE
#endif

// must be inlined: gcc sees no side effect in a call and removes it
template <int CACHE = MEM_CACHE_L1>
MEM_ALWAYS_INLINE void mem_prefetch(const void * data, size_t size) {
#if defined(__GNUC__)
    for (size_t offs = 0; offs < size; offs += CACHE_LINE_SIZE) {
        __builtin_prefetch((const char *) data + offs, 0, CACHE);
    }
#else
    GGML_UNUSED(data);
    GGML_UNUSED(size);
#endif
}

// types of rows
//   column  the address of column c of a row
//   value   the number there, without the scale
//   load    MEM_VEC such numbers from the l-th on, in the same block
//   scale   the factor of the numbers in the block of column c, 1 if the type is not scaled

struct mem_row_f32 {
    static constexpr bool scaled = false;

    static const float * column(const char * row, int64_t c) { return (const float *) row + c; }
    static float   value(const float * x)                    { return *x; }
    static mem_vec load (const float * x, int64_t l)         { return mem_load(x + l); }
    static float   scale(const char * /*row*/, int64_t /*c*/) { return 1.0f; }
};

struct mem_row_f16 {
    static constexpr bool scaled = false;

    static const ggml_fp16_t * column(const char * row, int64_t c) { return (const ggml_fp16_t *) row + c; }
    static float   value(const ggml_fp16_t * x)                    { return GGML_CPU_FP16_TO_FP32(*x); }
    static mem_vec load (const ggml_fp16_t * x, int64_t l)         { return mem_vec_ops::load_f16(x + l); }
    static float   scale(const char * /*row*/, int64_t /*c*/)      { return 1.0f; }
};

struct mem_row_q8_0 {
    static constexpr bool scaled = true;

    static const block_q8_0 & block(const char * row, int64_t c) { return ((const block_q8_0 *) row)[c/QK8_0]; }

    static const int8_t * column(const char * row, int64_t c) { return block(row, c).qs + c%QK8_0; }
    static float   value(const int8_t * x)                    { return *x; }
    static mem_vec load (const int8_t * x, int64_t l)         { return mem_vec_ops::load_i8(x + l); }
    static float   scale(const char * row, int64_t c)         { return mem_vec_ops::fp16_to_fp32(block(row, c).d); }
};

// calls f with the type of the rows of a table
template <typename F>
static void mem_by_type(const ggml_tensor * table, F f) {
    switch (table->type) {
        case GGML_TYPE_F32:  f(mem_row_f32());  break;
        case GGML_TYPE_F16:  f(mem_row_f16());  break;
        case GGML_TYPE_Q8_0: f(mem_row_q8_0()); break;
        default: GGML_ABORT("fatal error");
    }
}

// calls f with integral constants that add up to n, 4 at most
template <typename F>
static void mem_by_four(int64_t n, F f) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        f(std::integral_constant<int, 4>(), j);
    }
    switch (n - j) {
        case 3: f(std::integral_constant<int, 3>(), j); break;
        case 2: f(std::integral_constant<int, 2>(), j); break;
        case 1: f(std::integral_constant<int, 1>(), j); break;
    }
}

// a row of size d to F32
template <typename T>
static void mem_row_to_f32(const char * row, int64_t d, float * y) {
    int64_t c = 0;
    for (; c + QK8_0 <= d; c += QK8_0) {
        const auto *  x     = T::column(row, c);
        const mem_vec scale = mem_set1(T::scale(row, c));
        for (int64_t l = 0; l < QK8_0; l += MEM_VEC) {
            mem_store(y + c + l, mem_mul(T::load(x, l), scale));
        }
    }
    for (; c < d; c++) {
        y[c] = T::value(T::column(row, c))*T::scale(row, c);
    }
}

// n rows of a table from i0 on to F32
static void mem_to_f32(const ggml_tensor * table, int64_t i0, int64_t n, float * y) {
    mem_by_type(table, [&](auto type) {
        for (int64_t i = 0; i < n; i++) {
            mem_row_to_f32<decltype(type)>((const char *) table->data + (i0 + i)*table->nb[1], table->ne[0], y + i*table->ne[0]);
        }
    });
}
