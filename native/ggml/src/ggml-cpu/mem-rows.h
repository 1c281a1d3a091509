// Rows of a table of a memory, read in place: F32, F16 or Q8_0
#pragma once

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "ops.h"
#include "quants.h"
#include "simd-gemm.h"
#include "simd-mappings.h"

#include <algorithm>
#include <functional>
#include <type_traits>

constexpr int64_t MEM_TILE_ROWS = 64;

// localities of __builtin_prefetch
constexpr int MEM_CACHE_L1 = 3;
constexpr int MEM_CACHE_L2 = 2;

#if defined(__GNUC__)
#define MEM_ALWAYS_INLINE static inline __attribute__((always_inline))
#else
#define MEM_ALWAYS_INLINE static inline
#endif

// gcc takes a call of it for one without effect
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

#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic)
#define MEM_SIMD
#endif

// the scales of blocks: an instruction, where there is one, does not push the rows out of the cache as ggml's table does
static inline float mem_fp16_to_fp32(ggml_fp16_t x) {
#if defined(__F16C__)
    return GGML_CPU_COMPUTE_FP16_TO_FP32(x);
#else
    return GGML_CPU_FP16_TO_FP32(x);
#endif
}

// types of rows
//   at     where column c of a row is
//   value  the value there
//   load   GGML_F32_EPR values from the l-th on, in the same block
//   scale  what the values of the block of column c are multiplied by

struct mem_row_f32 {
    static constexpr bool scaled = false;

    static const float * at(const char * row, int64_t c) { return (const float *) row + c; }
    static float value(const float * x) { return *x; }
    static float scale(const char * /*row*/, int64_t /*c*/) { return 1.0f; }
#if defined(MEM_SIMD)
    static GGML_F32_VEC load(const float * x, int64_t l) { return GGML_F32_VEC_LOAD(x + l); }
#endif
};

struct mem_row_f16 {
    static constexpr bool scaled = false;

    static const ggml_fp16_t * at(const char * row, int64_t c) { return (const ggml_fp16_t *) row + c; }
    static float value(const ggml_fp16_t * x) { return GGML_CPU_FP16_TO_FP32(*x); }
    static float scale(const char * /*row*/, int64_t /*c*/) { return 1.0f; }
#if defined(MEM_SIMD)
    static GGML_F32_VEC load(const ggml_fp16_t * x, int64_t l) {
#if defined(__AVX512F__)
        return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (x + l)));
#elif defined(__F16C__)
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (x + l)));
#elif defined(__ARM_NEON) && defined(__aarch64__)
        return vcvt_f32_f16(vld1_f16((const __fp16 *) (x + l)));
#else
        float y[GGML_F32_EPR];
        for (int i = 0; i < GGML_F32_EPR; i++) {
            y[i] = GGML_CPU_FP16_TO_FP32(x[l + i]);
        }
        return GGML_F32_VEC_LOAD(y);
#endif
    }
#endif
};

struct mem_row_q8_0 {
    static constexpr bool scaled = true;

    static const int8_t * at(const char * row, int64_t c) { return ((const block_q8_0 *) row)[c/QK8_0].qs + c%QK8_0; }
    static float value(const int8_t * x) { return *x; }
    static float scale(const char * row, int64_t c) { return mem_fp16_to_fp32(((const block_q8_0 *) row)[c/QK8_0].d); }
#if defined(MEM_SIMD)
    static GGML_F32_VEC load(const int8_t * x, int64_t l) {
#if defined(__AVX512F__)
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) (x + l))));
#elif defined(__AVX2__)
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (x + l))));
#else
        float y[GGML_F32_EPR];
        for (int i = 0; i < GGML_F32_EPR; i++) {
            y[i] = x[l + i];
        }
        return GGML_F32_VEC_LOAD(y);
#endif
    }
#endif
};

#if defined(__AVX2__)
// N vectors, 4 at most, to the sums of their lanes
template <int N>
static void mem_sum_lanes(const __m256 * x, float * sum) {
    const __m256 ab = _mm256_hadd_ps(x[0], x[std::min(1, N - 1)]);
    const __m256 cd = _mm256_hadd_ps(x[std::min(2, N - 1)], x[N - 1]);
    const __m256 y  = _mm256_hadd_ps(ab, cd);
    float res[4];
    _mm_storeu_ps(res, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
    std::copy(res, res + N, sum);
}
#endif

#if defined(__AVX512F__)
template <int N>
static void mem_sum_lanes(const __m512 * x, float * sum) {
    __m256 half[N];
    for (int i = 0; i < N; i++) {
        half[i] = _mm256_add_ps(_mm512_castps512_ps256(x[i]), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x[i]), 1)));
    }
    mem_sum_lanes<N>(half, sum);
}
#elif defined(MEM_SIMD) && !defined(__AVX2__)
template <int N>
static void mem_sum_lanes(const GGML_F32_VEC * x, float * sum) {
    for (int i = 0; i < N; i++) {
        float lane[GGML_F32_EPR];
        GGML_F32_VEC_STORE(lane, x[i]);
        for (int l = GGML_F32_EPR/2; l > 0; l /= 2) {
            for (int m = 0; m < l; m++) {
                lane[m] += lane[m + l];
            }
        }
        sum[i] = lane[0];
    }
}
#endif

// sum[r*NQ + j] = k[r]*q[j] for NR rows of size d and NQ queries, of which NR*NQ is 4 at most
template <typename T, int NR, int NQ>
static inline void mem_dot(int64_t d, const char * const * k, const float * q, float * sum) {
    std::fill(sum, sum + NR*NQ, 0.0f);
    int64_t c = 0;
#if defined(MEM_SIMD)
    GGML_F32_VEC acc[NR*NQ];
    for (int i = 0; i < NR*NQ; i++) {
        acc[i] = GGML_F32_VEC_ZERO;
    }
    constexpr int64_t step = T::scaled ? QK8_0 : GGML_F32_EPR;
    for (; c + step <= d; c += step) {
        for (int r = 0; r < NR; r++) {
            const auto * x = T::at(k[r], c);
            GGML_F32_VEC part[NQ];
            for (int j = 0; j < NQ; j++) {
                part[j] = T::scaled ? GGML_F32_VEC_ZERO : acc[r*NQ + j];
            }
            for (int64_t l = 0; l < step; l += GGML_F32_EPR) {
                const GGML_F32_VEC y = T::load(x, l);
                for (int j = 0; j < NQ; j++) {
                    part[j] = GGML_F32_VEC_FMA(part[j], y, GGML_F32_VEC_LOAD(q + j*d + c + l));
                }
            }
            const GGML_F32_VEC scale = GGML_F32_VEC_SET1(T::scale(k[r], c));
            for (int j = 0; j < NQ; j++) {
                acc[r*NQ + j] = T::scaled ? GGML_F32_VEC_FMA(acc[r*NQ + j], part[j], scale) : part[j];
            }
        }
    }
    mem_sum_lanes<NR*NQ>(acc, sum);
#endif
    for (; c < d; c++) {
        for (int r = 0; r < NR; r++) {
            const float x = T::value(T::at(k[r], c))*T::scale(k[r], c);
            for (int j = 0; j < NQ; j++) {
                sum[r*NQ + j] += x*q[j*d + c];
            }
        }
    }
}

#if defined(__AVX512F__)
// x[4*j + r] for rows r and queries j to the sums of their lanes, sum[j*stride + r]
template <int NQ>
static inline void mem_sum_rows(const __m512 * x, float * sum, int64_t stride) {
    __m512 y[4]; // of a query: in each quarter the sums of that quarter for 4 rows
    for (int j = 0; j < NQ; j++) {
        const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(x[4*j + 0], x[4*j + 1]), _mm512_unpackhi_ps(x[4*j + 0], x[4*j + 1]));
        const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(x[4*j + 2], x[4*j + 3]), _mm512_unpackhi_ps(x[4*j + 2], x[4*j + 3]));
        y[j] = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    }
    for (int j = 0; j < NQ; j++) {
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(y[j]), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(y[j]), 1)));
        _mm_storeu_ps(sum + j*stride, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
}

// sum[j*stride + r] = k[r]*q[j] for 4 rows without scales and NQ queries, 4 at most, of a size that is a multiple of 32
template <typename T, int NQ>
static inline void mem_dot_rows(int64_t d, const char * k, size_t row_size, const float * q, float * sum, int64_t stride) {
    __m512 acc[4*NQ];
    for (int i = 0; i < 4*NQ; i++) {
        acc[i] = _mm512_setzero_ps();
    }
    for (int64_t c = 0; c < d; c += 32) {
        for (int r = 0; r < 4; r++) {
            const auto * x = T::at(k + r*row_size, c);
            const __m512 y0 = T::load(x, 0);
            const __m512 y1 = T::load(x, 16);
            for (int j = 0; j < NQ; j++) {
                acc[4*j + r] = _mm512_fmadd_ps(y0, _mm512_loadu_ps(q + j*d + c), acc[4*j + r]);
                acc[4*j + r] = _mm512_fmadd_ps(y1, _mm512_loadu_ps(q + j*d + c + 16), acc[4*j + r]);
            }
        }
    }
    mem_sum_rows<NQ>(acc, sum, stride);
}
#endif

// sum[r] = k[r]*q for NR rows, 4 at most, all in Q8_0
template <int NR>
static inline void mem_dot_q8_0(int64_t d, const char * const * k, const block_q8_0 * q, float * sum) {
#if defined(__AVX2__)
    __m256 acc[NR];
    for (int r = 0; r < NR; r++) {
        acc[r] = _mm256_setzero_ps();
    }
    for (int64_t b = 0; b < d/QK8_0; b++) {
        const __m256i y   = _mm256_loadu_si256((const __m256i *) q[b].qs);
        const float   d_q = mem_fp16_to_fp32(q[b].d);
        for (int r = 0; r < NR; r++) {
            const block_q8_0 * row = (const block_q8_0 *) k[r] + b;

            // one factor of a product of bytes is unsigned
            const __m256i x = _mm256_loadu_si256((const __m256i *) row->qs);
            const __m256i u = _mm256_sign_epi8(x, x);
            const __m256i v = _mm256_sign_epi8(y, x);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
            const __m256i p = _mm256_dpbusd_epi32(_mm256_setzero_si256(), u, v);
#else
            const __m256i p = _mm256_madd_epi16(_mm256_maddubs_epi16(u, v), _mm256_set1_epi16(1));
#endif
            const float scale = d_q*mem_fp16_to_fp32(row->d);
            acc[r] = _mm256_fmadd_ps(_mm256_set1_ps(scale), _mm256_cvtepi32_ps(p), acc[r]);
        }
    }
    mem_sum_lanes<NR>(acc, sum);
#else
    for (int r = 0; r < NR; r++) {
        ggml_vec_dot_q8_0_q8_0(d, sum + r, 0, k[r], 0, q, 0, 1);
    }
#endif
}

#if defined(MEM_SIMD)
// R vectors of columns from c on
template <typename T, int NQ, int R>
static void mem_weigh_columns(int64_t n, int64_t c, int64_t d, const float * s, int64_t stride, const char * v, size_t row_size, float * o) {
    GGML_F32_VEC acc[NQ][R];
    for (int j = 0; j < NQ; j++) {
        for (int r = 0; r < R; r++) {
            acc[j][r] = GGML_F32_VEC_LOAD(o + j*d + c + r*GGML_F32_EPR);
        }
    }
    for (int64_t i = 0; i < n; i++, v += row_size) {
        const auto * v_c = T::at(v, c);
        GGML_F32_VEC x[R];
        for (int r = 0; r < R; r++) {
            x[r] = T::load(v_c, r*GGML_F32_EPR);
        }
        for (int j = 0; j < NQ; j++) {
            const GGML_F32_VEC w = GGML_F32_VEC_SET1(s[j*stride + i]);
            for (int r = 0; r < R; r++) {
                acc[j][r] = GGML_F32_VEC_FMA(acc[j][r], x[r], w);
            }
        }
    }
    for (int j = 0; j < NQ; j++) {
        for (int r = 0; r < R; r++) {
            GGML_F32_VEC_STORE(o + j*d + c + r*GGML_F32_EPR, acc[j][r]);
        }
    }
}
#endif

// o[j] += sum_i s[j*stride + i]*v[i] for n rows of size d, one tile at most, and NQ queries
template <typename T, int NQ>
static void mem_weigh(int64_t n, int64_t d, const float * s, int64_t stride, const char * v, size_t row_size, float * o) {
    int64_t c = 0;
#if defined(MEM_SIMD)
    constexpr int R = std::min(NQ < 3 ? 4 : 2, 32/GGML_F32_EPR); // what fits into 16 registers, and divides a block
    if (T::scaled) {
        for (; c < d; c += QK8_0) {
            float scale[MEM_TILE_ROWS];
            float w[NQ*MEM_TILE_ROWS];
            for (int64_t i = 0; i < n; i++) {
                scale[i] = T::scale(v + i*row_size, c);
            }
            for (int j = 0; j < NQ; j++) {
                for (int64_t i = 0; i < n; i++) {
                    w[j*MEM_TILE_ROWS + i] = s[j*stride + i]*scale[i];
                }
            }
            for (int64_t l = c; l < c + QK8_0; l += R*GGML_F32_EPR) {
                mem_weigh_columns<T, NQ, R>(n, l, d, w, MEM_TILE_ROWS, v, row_size, o);
            }
        }
    } else {
        for (; c + R*GGML_F32_EPR <= d; c += R*GGML_F32_EPR) {
            mem_weigh_columns<T, NQ, R>(n, c, d, s, stride, v, row_size, o);
        }
        for (; c + GGML_F32_EPR <= d; c += GGML_F32_EPR) {
            mem_weigh_columns<T, NQ, 1>(n, c, d, s, stride, v, row_size, o);
        }
    }
#endif
    for (; c < d; c++) {
        for (int64_t i = 0; i < n; i++) {
            const float x = T::value(T::at(v + i*row_size, c))*T::scale(v + i*row_size, c);
            for (int j = 0; j < NQ; j++) {
                o[j*d + c] += s[j*stride + i]*x;
            }
        }
    }
}

// a row of size d
template <typename T>
static void mem_row_to_f32(const char * row, int64_t d, float * y) {
    int64_t c = 0;
#if defined(MEM_SIMD)
    for (; c + QK8_0 <= d; c += QK8_0) {
        const auto *       x     = T::at(row, c);
        const GGML_F32_VEC scale = GGML_F32_VEC_SET1(T::scale(row, c));
        for (int64_t l = 0; l < QK8_0; l += GGML_F32_EPR) {
            GGML_F32_VEC_STORE(y + c + l, GGML_F32_VEC_MUL(T::load(x, l), scale));
        }
    }
#endif
    for (; c < d; c++) {
        y[c] = T::value(T::at(row, c))*T::scale(row, c);
    }
}

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

// the maxima of every LANES-th of n numbers
template <int LANES>
static void mem_max_lanes(const float * x, int64_t n, float * max) {
    std::fill(max, max + LANES, -INFINITY);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int l = 0; l < LANES; l++) { // vectorized
            max[l] = std::max(max[l], x[i + l]);
        }
    }
    for (int64_t l = 0; i + l < n; l++) {
        max[l] = std::max(max[l], x[i + l]);
    }
}

// of the scores of a tile
static float mem_tile_max(const float * x) {
#if defined(__AVX512F__)
    __m512 max = _mm512_loadu_ps(x);
    for (int64_t i = 16; i < MEM_TILE_ROWS; i += 16) {
        max = _mm512_max_ps(_mm512_loadu_ps(x + i), max);
    }
    return _mm512_reduce_max_ps(max);
#else
    float max[8];
    mem_max_lanes<8>(x, MEM_TILE_ROWS, max);
    return *std::max_element(max, max + 8);
#endif
}

// a bound from below of the k-th largest of n scores, which not many more of them reach if n is large and k is not
static float mem_bound_of_best(const float * x, int64_t n, int64_t k) {
    constexpr int LANES = 32;
    if (k > LANES) {
        return -INFINITY;
    }
    float max[LANES];
    mem_max_lanes<LANES>(x, n, max);

    int n_above[LANES] = {}; // vectorized, which a selection is not
    for (int i = 0; i < LANES; i++) {
        for (int l = 0; l < LANES; l++) {
            n_above[l] += max[i] >= max[l];
        }
    }
    float bound = -INFINITY;
    for (int l = 0; l < LANES; l++) {
        bound = n_above[l] >= k ? std::max(bound, max[l]) : bound;
    }
    return bound;
}

// n rows of a table from i0 on
static void mem_to_f32(const ggml_tensor * table, int64_t i0, int64_t n, float * y) {
    mem_by_type(table, [&](auto type) {
        for (int64_t i = 0; i < n; i++) {
            mem_row_to_f32<decltype(type)>((const char *) table->data + (i0 + i)*table->nb[1], table->ne[0], y + i*table->ne[0]);
        }
    });
}

#if defined(__AVX512F__)
// c[4][64] += a[4][k]*b[k][64], in rows of c and b of size n; out of line gcc keeps a copy of the sums in memory
MEM_ALWAYS_INLINE void mem_gemm_4x64(float * c, const float * a, const float * b, int64_t k, int64_t n) {
    __m512 acc[16];
    for (int t = 0; t < 16; t++) {
        acc[t] = _mm512_loadu_ps(c + t/4*n + t%4*16);
    }
    for (int64_t l = 0; l < k; l++) {
        __m512 row[4];
        for (int r = 0; r < 4; r++) {
            row[r] = _mm512_loadu_ps(b + l*n + r*16);
#if defined(__GNUC__)
            asm("" : "+v"(row[r])); // or it is loaded again for each row of a
#endif
        }
        for (int t = 0; t < 16; t++) {
            acc[t] = _mm512_fmadd_ps(row[t%4], _mm512_set1_ps(a[t/4*k + l]), acc[t]);
        }
    }
    for (int t = 0; t < 16; t++) {
        _mm512_storeu_ps(c + t/4*n + t%4*16, acc[t]);
    }
}
#endif

// c[m][n] += a[m][k]*b[k][n]
static void mem_gemm(float * c, const float * a, const float * b, int64_t m, int64_t k, int64_t n) {
#if defined(__AVX512F__)
    for (; n % 64 == 0 && m >= 4; m -= 4, a += 4*k, c += 4*n) {
        for (int64_t j = 0; j < n; j += 64) {
            mem_gemm_4x64(c + j, a, b + j, k, n);
        }
    }
#endif
    simd_gemm(c, a, b, m, k, n);
}
