// Vectors of floats: those of simd-mappings.h, or single floats where it has none of a fixed size
#pragma once

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "simd-mappings.h"

#include <algorithm>

#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic)
using mem_vec = GGML_F32_VEC;

constexpr int MEM_VEC = GGML_F32_EPR; // numbers in a vector

static inline mem_vec mem_zero()                                   { return GGML_F32_VEC_ZERO; }
static inline mem_vec mem_set1(float x)                            { return GGML_F32_VEC_SET1(x); }
static inline mem_vec mem_load(const float * x)                    { return GGML_F32_VEC_LOAD(x); }
static inline void    mem_store(float * y, mem_vec x)              { GGML_F32_VEC_STORE(y, x); }
static inline mem_vec mem_mul(mem_vec x, mem_vec y)                { return GGML_F32_VEC_MUL(x, y); }
static inline mem_vec mem_fma(mem_vec sum, mem_vec x, mem_vec y)   { return GGML_F32_VEC_FMA(sum, x, y); } // sum + x*y
#else
using mem_vec = float;

constexpr int MEM_VEC = 1;

static inline mem_vec mem_zero()                                   { return 0.0f; }
static inline mem_vec mem_set1(float x)                            { return x; }
static inline mem_vec mem_load(const float * x)                    { return *x; }
static inline void    mem_store(float * y, mem_vec x)              { *y = x; }
static inline mem_vec mem_mul(mem_vec x, mem_vec y)                { return x*y; }
static inline mem_vec mem_fma(mem_vec sum, mem_vec x, mem_vec y)   { return sum + x*y; }
#endif

// what an architecture may do faster: it defines mem_vec_ops, whose functions hide these
struct mem_vec_generic {
    static float fp16_to_fp32(ggml_fp16_t x) { return GGML_CPU_FP16_TO_FP32(x); }

    // MEM_VEC numbers
    static mem_vec load_f16(const ggml_fp16_t * x) {
        float y[MEM_VEC];
        for (int i = 0; i < MEM_VEC; i++) {
            y[i] = GGML_CPU_FP16_TO_FP32(x[i]);
        }
        return mem_load(y);
    }

    static mem_vec load_i8(const int8_t * x) {
        float y[MEM_VEC];
        for (int i = 0; i < MEM_VEC; i++) {
            y[i] = x[i];
        }
        return mem_load(y);
    }

    // N vectors, 4 at most, to the sums of their lanes
    template <int N>
    static void sum_lanes(const mem_vec * x, float * sum) {
        for (int i = 0; i < N; i++) {
            float lane[MEM_VEC];
            mem_store(lane, x[i]);
            for (int l = MEM_VEC/2; l > 0; l /= 2) {
                for (int m = 0; m < l; m++) {
                    lane[m] += lane[m + l];
                }
            }
            sum[i] = lane[0];
        }
    }
};

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#include "arch/x86/mem-vec.h"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include "arch/arm/mem-vec.h"
#else
using mem_vec_ops = mem_vec_generic;
#endif
