// Vectors of floats on x86, see mem-vec.h
#pragma once

#if defined(__F16C__)
struct mem_vec_f16c : mem_vec_generic {
    // unlike the table of ggml, the instruction does not push rows out of the cache
    static float fp16_to_fp32(ggml_fp16_t x) { return GGML_CPU_COMPUTE_FP16_TO_FP32(x); }

    static __m256 load_f16(const ggml_fp16_t * x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x)); }
};
#else
using mem_vec_f16c = mem_vec_generic;
#endif

#if defined(__AVX2__)
struct mem_vec_avx2 : mem_vec_f16c {
    template <int N>
    static void sum_lanes(const __m256 * x, float * sum) {
        const __m256 ab = _mm256_hadd_ps(x[0], x[std::min(1, N - 1)]);
        const __m256 cd = _mm256_hadd_ps(x[std::min(2, N - 1)], x[N - 1]);
        const __m256 y  = _mm256_hadd_ps(ab, cd);
        float res[4];
        _mm_storeu_ps(res, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
        std::copy(res, res + N, sum);
    }

    static __m256 load_i8(const int8_t * x) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) x))); }
};
#endif

#if defined(__AVX512F__)
struct mem_vec_avx512 : mem_vec_avx2 {
    static __m512 load_f16(const ggml_fp16_t * x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x)); }
    static __m512 load_i8 (const int8_t      * x) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) x))); }

    static __m256 add_halves(__m512 x) {
        return _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    }

    template <int N>
    static void sum_lanes(const __m512 * x, float * sum) {
        __m256 half[N];
        for (int i = 0; i < N; i++) {
            half[i] = add_halves(x[i]);
        }
        mem_vec_avx2::sum_lanes<N>(half, sum);
    }
};

using mem_vec_ops = mem_vec_avx512;
#elif defined(__AVX2__)
using mem_vec_ops = mem_vec_avx2;
#else
using mem_vec_ops = mem_vec_f16c;
#endif
