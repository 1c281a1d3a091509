// Products and sums of rows on x86, see mem-kernels.h
#pragma once

#if defined(__AVX2__)
struct mem_kernels_avx2 : mem_kernels_generic {
    template <int NR>
    static void dot_q8_0(int64_t d, const char * const * k, const block_q8_0 * q, float * sum) {
        __m256 acc[NR];
        for (int r = 0; r < NR; r++) {
            acc[r] = _mm256_setzero_ps();
        }
        for (int64_t b = 0; b < d/QK8_0; b++) {
            const __m256i y   = _mm256_loadu_si256((const __m256i *) q[b].qs);
            const float   d_q = mem_vec_ops::fp16_to_fp32(q[b].d);
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
                const float scale = d_q*mem_vec_ops::fp16_to_fp32(row->d);
                acc[r] = _mm256_fmadd_ps(_mm256_set1_ps(scale), _mm256_cvtepi32_ps(p), acc[r]);
            }
        }
        mem_vec_avx2::sum_lanes<NR>(acc, sum);
    }
};
#endif

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
        const __m256 half = mem_vec_ops::add_halves(y[j]);
        _mm_storeu_ps(sum + j*stride, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
}

// sum[j*stride + r] = k[r]*q[j] for 4 rows without scales and NQ queries, 4 at most; their size d is a multiple of 32
template <typename T, int NQ>
static inline void mem_dot_rows(int64_t d, const char * k, size_t row_size, const float * q, float * sum, int64_t stride) {
    __m512 acc[4*NQ];
    for (int i = 0; i < 4*NQ; i++) {
        acc[i] = _mm512_setzero_ps();
    }
    for (int64_t c = 0; c < d; c += 32) {
        for (int r = 0; r < 4; r++) {
            const auto * x = T::column(k + r*row_size, c);
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

// c[4][64] += a[4][k]*b[k][64], in rows of c and b of size n
// inlined: out of line gcc keeps a copy of the sums in memory
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
            asm("" : "+v"(row[r])); // keeps gcc from loading it again for each row of a
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

struct mem_kernels_avx512 : mem_kernels_avx2 {
    static void dot(const ggml_tensor * key, int64_t i0, int64_t n, const float * q, int64_t n_q, const float * work, float * s) {
        const int64_t d      = key->ne[0];
        const int64_t n_four = d % 32 == 0 && key->type != GGML_TYPE_Q8_0 ? n/4*4 : 0; // rows that are read four at a time
        const char * rows = (const char *) key->data + i0*key->nb[1];

        auto by_four = [&](auto type) {
            mem_by_four(n_q, [&](auto nq, int64_t j) {
                for (int64_t i = 0; i < n_four; i += 4) {
                    mem_dot_rows<decltype(type), nq>(d, rows + i*key->nb[1], key->nb[1], q + j*d, s + j*MEM_TILE_ROWS + i, MEM_TILE_ROWS);
                }
            });
        };
        switch (key->type) {
            case GGML_TYPE_F32: by_four(mem_row_f32()); break;
            case GGML_TYPE_F16: by_four(mem_row_f16()); break;
            default: break;
        }
        mem_kernels_avx2::dot(key, i0 + n_four, n - n_four, q, n_q, work, s + n_four);
    }

    // not inlined: in a large function gcc keeps some of the sums in memory
    MEM_NEVER_INLINE static void gemm(float * c, const float * a, const float * b, int64_t m, int64_t k, int64_t n) {
        for (; n % 64 == 0 && m >= 4; m -= 4, a += 4*k, c += 4*n) {
            for (int64_t j = 0; j < n; j += 64) {
                mem_gemm_4x64(c + j, a, b + j, k, n);
            }
        }
        mem_kernels_avx2::gemm(c, a, b, m, k, n);
    }

    static float tile_max(const float * x) {
        __m512 max = _mm512_loadu_ps(x);
        for (int64_t i = 16; i < MEM_TILE_ROWS; i += 16) {
            max = _mm512_max_ps(_mm512_loadu_ps(x + i), max);
        }
        return _mm512_reduce_max_ps(max);
    }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include "mem-vnni.h"
using mem_kernels = mem_kernels_vnni;
#elif defined(__AVX512F__)
using mem_kernels = mem_kernels_avx512;
#elif defined(__AVX2__)
using mem_kernels = mem_kernels_avx2;
#else
using mem_kernels = mem_kernels_generic;
#endif
