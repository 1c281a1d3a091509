// GGML_OP_MEM_STATE on the CPU: attention over the anchors of a memory, and lookups by exact scan or HNSW
//
// The query heads of a KV head share its table. Few queries: each row is read in place, once for all of them. Many: rows are
// converted to F32 in tiles, and scores and sums are matrix products.

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"

#include "mem-state.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "simd-mappings.h"
#include "simd-gemm.h"
#include "ops.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int64_t MEM_TILE_ROWS    = 32;
constexpr int64_t MEM_TILE_QUERIES = 64;

// with fewer queries than this, a dot product per row and query beats a matrix product with the transposed rows
constexpr int64_t MEM_GEMM_MIN_QUERIES = 8;

// up to this many tokens the rows of a table are split over the threads, above it the queries
constexpr int64_t MEM_SPLIT_MAX_TOKENS = 4;

// number of candidates that the HNSW search keeps on level 0; recall@1 is measured in tests/test_lookup.py
constexpr size_t MEM_HNSW_EF = 16;

// for tokens: keys are harder to find than centroids, because queries are not distributed like them
constexpr size_t MEM_HNSW_EF_TOKEN = 64;

struct mem_args {
    ggml_mem_kind kind;

    const ggml_tensor * q;      // [n_embd_k, n_tokens, n_head]
    const ggml_tensor * state;  // what to merge with, or nullptr
    const ggml_tensor * key;    // [n_embd_k, n]
    const ggml_tensor * bias;   // [n]
    const ggml_tensor * value;  // [n_embd_v, n]
    const ggml_tensor * lse;    // [n], centroids and residuals

    const int32_t * offset;     // [n_head_kv + 1]
    const int32_t * entry;      // [n_head_kv], where the search of a head begins
    const int32_t * link0;      // nullptr: there is no graph
    const int32_t * link;
    const int32_t * upper;

    int64_t n_embd_k, n_embd_v, n_tokens, n_head, n_head_kv, n_gqa;
    int64_t m0, m;

    float   scale;
    float   gain;
    int64_t top_k;
    int64_t hnsw_min_entries;   // smaller tables are scanned

    explicit mem_args(const ggml_tensor * dst) {
        q     = dst->src[0];
        state = dst->src[1];
        key   = dst->src[2];
        bias  = dst->src[3];
        value = dst->src[4];
        lse   = dst->src[5];

        n_embd_k  = key->ne[0];
        n_embd_v  = value->ne[0];
        n_tokens  = q->ne[1];
        n_head    = q->ne[2];
        n_head_kv = dst->src[6]->ne[0] - 1;
        n_gqa     = n_head/n_head_kv;

        offset = (const int32_t *) dst->src[6]->data;
        entry  = (const int32_t *) ((const char *) dst->src[6]->data + dst->src[6]->nb[1]);

        link0 = link = upper = nullptr;
        m0 = m = 0;
        if (dst->src[7]) {
            link0 = (const int32_t *) dst->src[7]->data;
            link  = (const int32_t *) dst->src[8]->data;
            upper = (const int32_t *) dst->src[9]->data;
            m0    = dst->src[7]->ne[0];
            m     = dst->src[8]->ne[0];
        }

        kind             = (ggml_mem_kind) ggml_get_op_params_i32(dst, 0);
        scale            = ggml_get_op_params_f32(dst, 1);
        gain             = ggml_get_op_params_f32(dst, 2);
        top_k            = ggml_get_op_params_i32(dst, 3);
        hnsw_min_entries = ggml_get_op_params_i32(dst, 4);
    }

    int64_t n(int64_t h) const { return offset[h + 1] - offset[h]; }

    bool use_hnsw(int64_t h) const { return link0 && n(h) > 0 && n(h) >= hnsw_min_entries; }

    // the queries of a KV head are numbered head by head
    const float * query(int64_t h, int64_t j) const {
        return (const float *) ((const char *) q->data + (h*n_gqa + j/n_tokens)*q->nb[2] + (j%n_tokens)*q->nb[1]);
    }

    float * result(ggml_tensor * dst, int64_t h, int64_t j) const {
        return (float *) ((char *) dst->data + (h*n_gqa + j/n_tokens)*dst->nb[1] + (j%n_tokens)*dst->nb[2]);
    }
};

void mem_prefetch(const void * data, size_t size) {
#if defined(__GNUC__)
    for (size_t offs = 0; offs < size; offs += CACHE_LINE_SIZE) {
        __builtin_prefetch((const char *) data + offs);
    }
#else
    GGML_UNUSED(data);
    GGML_UNUSED(size);
#endif
}

// n rows of a table from i0 on
void mem_to_f32(const ggml_tensor * table, int64_t i0, int64_t n, float * y) {
    const char  * x  = (const char *) table->data + i0*table->nb[1];
    const int64_t d  = table->ne[0];

    switch (table->type) {
        case GGML_TYPE_F32: memcpy(y, x, n*d*sizeof(float)); break;
        case GGML_TYPE_F16: ggml_cpu_fp16_to_fp32((const ggml_fp16_t *) x, y, n*d); break;
        case GGML_TYPE_Q8_0:
            {
                const block_q8_0 * block = (const block_q8_0 *) x;
                for (int64_t b = 0; b < n*d/QK8_0; b++) {
                    const float scale = GGML_CPU_FP16_TO_FP32(block[b].d);
                    for (int j = 0; j < QK8_0; j++) {
                        y[b*QK8_0 + j] = scale*block[b].qs[j];
                    }
                }
            } break;
        default: GGML_ABORT("fatal error");
    }
}

//
// rows of a table, read in place
//

#if defined(GGML_SIMD) && !defined(__ARM_FEATURE_SVE) && !defined(__riscv_v_intrinsic)
#define MEM_SIMD
#endif

// types of rows
//   at     where column c of a row is
//   value  the l-th value from there on, in the same block
//   load   GGML_F32_EPR of them
//   scale  what the values of the block of column c are multiplied by

struct mem_row_f32 {
    static constexpr bool scaled = false;

    static const float * at(const char * row, int64_t c) { return (const float *) row + c; }
    static float value(const float * x, int64_t l) { return x[l]; }
    static float scale(const char * /*row*/, int64_t /*c*/) { return 1.0f; }
#if defined(MEM_SIMD)
    static GGML_F32_VEC load(const float * x, int64_t l) { return GGML_F32_VEC_LOAD(x + l); }
#endif
};

struct mem_row_f16 {
    static constexpr bool scaled = false;

    static const ggml_fp16_t * at(const char * row, int64_t c) { return (const ggml_fp16_t *) row + c; }
    static float value(const ggml_fp16_t * x, int64_t l) { return GGML_CPU_FP16_TO_FP32(x[l]); }
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
    static float value(const int8_t * x, int64_t l) { return x[l]; }
    static float scale(const char * row, int64_t c) { return GGML_CPU_FP16_TO_FP32(((const block_q8_0 *) row)[c/QK8_0].d); }
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

#if defined(MEM_SIMD)
// NQ vectors, 4 at most, to the sums of their lanes
template <int NQ>
void mem_sum_lanes(const GGML_F32_VEC * x, float * sum) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256 ab = _mm256_hadd_ps(x[0], x[std::min(1, NQ - 1)]);
    const __m256 cd = _mm256_hadd_ps(x[std::min(2, NQ - 1)], x[NQ - 1]);
    const __m256 y  = _mm256_hadd_ps(ab, cd);
    float res[4];
    _mm_storeu_ps(res, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
    std::copy(res, res + NQ, sum);
#else
    for (int j = 0; j < NQ; j++) {
        float lane[GGML_F32_EPR];
        GGML_F32_VEC_STORE(lane, x[j]);
        for (int l = GGML_F32_EPR/2; l > 0; l /= 2) {
            for (int m = 0; m < l; m++) {
                lane[m] += lane[m + l];
            }
        }
        sum[j] = lane[0];
    }
#endif
}
#endif

// s[j*stride + i] = k[i]*q[j] for n rows of size d and NQ queries; a row is read once for all of them
template <typename T, int NQ>
void mem_dot(int64_t n, int64_t d, const char * k, size_t row_size, const float * q, float * s, int64_t stride) {
    for (int64_t i = 0; i < n; i++, k += row_size) {
        float sum[NQ] = {};
        int64_t c = 0;
#if defined(MEM_SIMD)
        GGML_F32_VEC acc[NQ];
        for (int j = 0; j < NQ; j++) {
            acc[j] = GGML_F32_VEC_ZERO;
        }
        constexpr int64_t step = T::scaled ? QK8_0 : GGML_F32_EPR;
        for (; c + step <= d; c += step) {
            const auto * x = T::at(k, c);
            GGML_F32_VEC part[NQ];
            for (int j = 0; j < NQ; j++) {
                part[j] = T::scaled ? GGML_F32_VEC_ZERO : acc[j];
            }
            for (int64_t l = 0; l < step; l += GGML_F32_EPR) {
                const GGML_F32_VEC y = T::load(x, l);
                for (int j = 0; j < NQ; j++) {
                    part[j] = GGML_F32_VEC_FMA(part[j], y, GGML_F32_VEC_LOAD(q + j*d + c + l));
                }
            }
            const GGML_F32_VEC scale = GGML_F32_VEC_SET1(T::scale(k, c));
            for (int j = 0; j < NQ; j++) {
                acc[j] = T::scaled ? GGML_F32_VEC_FMA(acc[j], part[j], scale) : part[j];
            }
        }
        mem_sum_lanes<NQ>(acc, sum);
#endif
        for (; c < d; c++) {
            const float x = T::value(T::at(k, c), 0)*T::scale(k, c);
            for (int j = 0; j < NQ; j++) {
                sum[j] += x*q[j*d + c];
            }
        }
        for (int j = 0; j < NQ; j++) {
            s[j*stride + i] = sum[j];
        }
    }
}

#if defined(MEM_SIMD)
// R vectors of columns from c on
template <typename T, int NQ, int R>
void mem_weigh_columns(int64_t n, int64_t c, int64_t d, const float * s, int64_t stride, const char * v, size_t row_size, float * o) {
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
void mem_weigh(int64_t n, int64_t d, const float * s, int64_t stride, const char * v, size_t row_size, float * o) {
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
            const float x = T::value(T::at(v + i*row_size, c), 0)*T::scale(v + i*row_size, c);
            for (int j = 0; j < NQ; j++) {
                o[j*d + c] += s[j*stride + i]*x;
            }
        }
    }
}

// calls f with the type of the rows of a table
template <typename F>
void mem_by_type(const ggml_tensor * table, F f) {
    switch (table->type) {
        case GGML_TYPE_F32:  f(mem_row_f32());  break;
        case GGML_TYPE_F16:  f(mem_row_f16());  break;
        case GGML_TYPE_Q8_0: f(mem_row_q8_0()); break;
        default: GGML_ABORT("fatal error");
    }
}

// calls f with integral constants that add up to n, 4 at most
template <typename F>
void mem_by_four(int64_t n, F f) {
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

using mem_candidate = std::pair<float, int32_t>; // score, entry of the head

// states under construction: sum_i exp(s_i - max) v_i and sum_i exp(s_i - max)
struct mem_acc {
    float * max; // [n_q]
    float * sum; // [n_q]
    float * o;   // [n_q][n_embd_v]
    int64_t n_embd_v;

    void clear(int64_t n_q) const {
        for (int64_t j = 0; j < n_q; j++) {
            clear_one(j);
        }
    }

    void clear_one(int64_t j) const {
        max[j] = -INFINITY;
        sum[j] = 0.0f;
        std::fill(o + j*n_embd_v, o + (j + 1)*n_embd_v, 0.0f);
    }

    // room for terms of up to s: returns the maximum that they are relative to
    float raise(int64_t j, float s) const {
        if (s > max[j]) {
            const float c = expf(max[j] - s);
            ggml_vec_scale_f32(n_embd_v, o + j*n_embd_v, c);
            sum[j] *= c;
            max[j]  = s;
        }
        return max[j];
    }

    // terms with the sum `weight` and the weighted values v, relative to s
    void add(int64_t j, float s, float weight, const float * v) const {
        if (s == -INFINITY || weight == 0.0f) {
            return;
        }
        const float c = expf(s - raise(j, s));
        ggml_vec_mad_f32(n_embd_v, o + j*n_embd_v, v, c);
        sum[j] += c*weight;
    }

    // (o, lse) merged with the state `in`, which may be nullptr; an empty state is (0, -inf)
    void finish(int64_t j, float gain, const float * in, float * out) const {
        max[j] += gain;
        if (max[j] == -INFINITY) {
            clear_one(j);
        }
        if (in) {
            add(j, in[n_embd_v], 1.0f, in);
        }
        const float inv = sum[j] > 0.0f ? 1.0f/sum[j] : 0.0f;
        for (int64_t i = 0; i < n_embd_v; i++) {
            out[i] = o[j*n_embd_v + i]*inv;
        }
        out[n_embd_v] = sum[j] > 0.0f ? max[j] + logf(sum[j]) : -INFINITY;
    }
};

// of the scores of a tile
float mem_tile_max(const float * x) {
    float max[8]; // one lane each, so that the loop is vectorized
    std::copy(x, x + 8, max);
    for (int64_t i = 8; i < MEM_TILE_ROWS; i += 8) {
        for (int l = 0; l < 8; l++) {
            max[l] = std::max(max[l], x[i + l]);
        }
    }
    return *std::max_element(max, max + 8);
}

// what one thread works with
struct mem_work {
    float * q;     // [MEM_TILE_QUERIES][n_embd_k]
    float * k;     // [MEM_TILE_ROWS][n_embd_k]
    float * k_t;   // [n_embd_k][MEM_TILE_ROWS]
    float * v;     // [MEM_TILE_ROWS][n_embd_v]
    float * s;     // [MEM_TILE_QUERIES][MEM_TILE_ROWS]
    mem_acc acc;   // [MEM_TILE_QUERIES]

    static size_t size(int64_t n_embd_k, int64_t n_embd_v) {
        return MEM_TILE_QUERIES*(n_embd_k + MEM_TILE_ROWS + n_embd_v + 2) + MEM_TILE_ROWS*(2*n_embd_k + n_embd_v) + CACHE_LINE_SIZE/sizeof(float);
    }

    mem_work(const mem_args & a, float * data) {
        auto take = [&](int64_t n) {
            float * res = data;
            data += n;
            return res;
        };
        q   = take(MEM_TILE_QUERIES*a.n_embd_k);
        k   = take(MEM_TILE_ROWS*a.n_embd_k);
        k_t = take(MEM_TILE_ROWS*a.n_embd_k);
        v   = take(MEM_TILE_ROWS*a.n_embd_v);
        s   = take(MEM_TILE_QUERIES*MEM_TILE_ROWS);
        acc = { take(MEM_TILE_QUERIES), take(MEM_TILE_QUERIES), take(MEM_TILE_QUERIES*a.n_embd_v), a.n_embd_v };
    }

    // queries j0 .. j0 + n_q - 1 of a KV head
    void load(const mem_args & a, int64_t h, int64_t j0, int64_t n_q) const {
        for (int64_t j = 0; j < n_q; j++) {
            memcpy(q + j*a.n_embd_k, a.query(h, j0 + j), a.n_embd_k*sizeof(float));
        }
    }

    // scale*key*q + bias of n rows from i0 on, for n_q loaded queries, to s; -INFINITY fills up the tile
    void score(const mem_args & a, int64_t i0, int64_t n, int64_t n_q, float scale) const {
        const int64_t d = a.n_embd_k;
        if (n_q < MEM_GEMM_MIN_QUERIES) {
            const char * rows = (const char *) a.key->data + i0*a.key->nb[1];
            mem_by_type(a.key, [&](auto type) {
                mem_by_four(n_q, [&](auto nq, int64_t j) {
                    mem_dot<decltype(type), nq>(n, d, rows, a.key->nb[1], q + j*d, s + j*MEM_TILE_ROWS, MEM_TILE_ROWS);
                });
            });
        } else {
            mem_to_f32(a.key, i0, n, k);
            if (n < MEM_TILE_ROWS) {
                memset(k_t, 0, d*MEM_TILE_ROWS*sizeof(float));
            }
            for (int64_t i = 0; i < n; i++) {
                for (int64_t c = 0; c < d; c++) {
                    k_t[c*MEM_TILE_ROWS + i] = k[i*d + c];
                }
            }
            memset(s, 0, n_q*MEM_TILE_ROWS*sizeof(float));
            simd_gemm(s, q, k_t, n_q, d, MEM_TILE_ROWS);
        }

        const float * bias = (const float *) a.bias->data + i0;
        for (int64_t j = 0; j < n_q; j++) {
            for (int64_t i = 0; i < n; i++) {
                s[j*MEM_TILE_ROWS + i] = s[j*MEM_TILE_ROWS + i]*scale + bias[i];
            }
            std::fill(s + j*MEM_TILE_ROWS + n, s + (j + 1)*MEM_TILE_ROWS, -INFINITY);
        }
    }

    // attention of n_q loaded queries over the rows i0 .. i1 - 1
    void attend(const mem_args & a, int64_t i0, int64_t i1, int64_t n_q) const {
        const int64_t d = a.n_embd_v;
        for (; i0 < i1; i0 += MEM_TILE_ROWS) {
            const int64_t n = std::min(MEM_TILE_ROWS, i1 - i0);

            // values are used after the keys, and by then the keys of the next tile are on their way as well
            mem_prefetch((const char *) a.value->data + i0*a.value->nb[1], n*a.value->nb[1]);
            mem_prefetch((const char *) a.key->data + (i0 + n)*a.key->nb[1], std::min(MEM_TILE_ROWS, i1 - i0 - n)*a.key->nb[1]);

            score(a, i0, n, n_q, a.scale);

            for (int64_t j = 0; j < n_q; j++) {
                float * row = s + j*MEM_TILE_ROWS;
                acc.sum[j] += ggml_vec_soft_max_f32(n, row, row, acc.raise(j, mem_tile_max(row)));
            }

            if (n_q < MEM_GEMM_MIN_QUERIES) {
                const char * rows = (const char *) a.value->data + i0*a.value->nb[1];
                mem_by_type(a.value, [&](auto type) {
                    mem_by_four(n_q, [&](auto nq, int64_t j) {
                        mem_weigh<decltype(type), nq>(n, d, s + j*MEM_TILE_ROWS, MEM_TILE_ROWS, rows, a.value->nb[1], acc.o + j*d);
                    });
                });
            } else {
                mem_to_f32(a.value, i0, n, v);
                // rows beyond the last have no weight
                for (int64_t j = 0; j < n_q; j++) {
                    std::fill(s + j*MEM_TILE_ROWS + n, s + (j + 1)*MEM_TILE_ROWS, 0.0f);
                }
                memset(v + n*d, 0, (MEM_TILE_ROWS - n)*d*sizeof(float));
                simd_gemm(acc.o, s, v, n_q, MEM_TILE_ROWS, d);
            }
        }
    }

    // the entry of KV head h with the largest key*q + bias among the rows i0 .. i1 - 1, for n_q loaded queries
    void scan(const mem_args & a, int64_t h, int64_t i0, int64_t i1, int64_t n_q, mem_candidate * best) const {
        for (; i0 < i1; i0 += MEM_TILE_ROWS) {
            const int64_t n = std::min(MEM_TILE_ROWS, i1 - i0);

            score(a, i0, n, n_q, 1.0f);

            for (int64_t j = 0; j < n_q; j++) {
                const float * row = s + j*MEM_TILE_ROWS;
                const float   top = mem_tile_max(row);
                if (top > best[j].first) {
                    best[j] = { top, (int32_t) (i0 - a.offset[h] + (std::find(row, row + n, top) - row)) };
                }
            }
        }
    }
};

//
// lookup
//

// rows of the keys of a head, scored against one query
struct mem_rows {
    const ggml_tensor * table;
    const char  * key;
    const float * bias;
    const float * q;
    float         scale;

    float score(int64_t i) const {
        float s;
        mem_by_type(table, [&](auto type) {
            mem_dot<decltype(type), 1>(1, table->ne[0], key + i*table->nb[1], table->nb[1], q, &s, 1);
        });
        return s*scale + bias[i];
    }

    void prefetch(int64_t i) const {
        mem_prefetch(key + i*table->nb[1], table->nb[1]);
    }
};

struct mem_search {
    std::vector<mem_candidate> open;  // HNSW: to be expanded, a max-heap
    std::vector<mem_candidate> found; // the best so far, a min-heap
    std::vector<int32_t>       next;  // HNSW: neighbours not visited yet

    std::vector<uint32_t> visited;    // per entry, equal to epoch when visited in this search
    uint32_t              epoch = 0;

    static mem_rows rows(const mem_args & a, int64_t h, const float * q, float scale) {
        return { a.key, (const char *) a.key->data + a.offset[h]*a.key->nb[1], (const float *) a.bias->data + a.offset[h], q, scale };
    }

    void keep(float s, int32_t i, size_t k) {
        if (found.size() < k || s > found.front().first) {
            if (found.size() == k) {
                std::pop_heap(found.begin(), found.end(), std::greater<mem_candidate>());
                found.pop_back();
            }
            found.push_back({s, i});
            std::push_heap(found.begin(), found.end(), std::greater<mem_candidate>());
        }
    }

    // the k best entries, unordered
    void scan(const mem_rows & rows, int64_t n, size_t k) {
        found.clear();
        for (int64_t i = 0; i < n; i++) {
            keep(rows.score(i), (int32_t) i, k);
        }
    }

    // Malkov, Yashunin: Efficient and robust approximate nearest neighbor search using HNSW graphs, algorithms 2 and 5
    // about the ef best entries, unordered
    void hnsw(const mem_args & a, const mem_rows & rows, int64_t h, size_t ef) {
        const int64_t n = a.n(h);

        const int32_t * link0 = a.link0 + a.offset[h]*a.m0;
        const int32_t * upper = a.upper + a.offset[h];

        int32_t cur   = a.entry[h];
        float   cur_s = rows.score(cur);

        // greedy descent to level 1
        for (int32_t level = upper[cur + 1] - upper[cur]; level > 0; level--) {
            for (bool moved = true; moved; ) {
                moved = false;
                const int32_t * links = a.link + (int64_t) (upper[cur] + level - 1)*a.m;
                for (int32_t j = 0; j < a.m && links[j] >= 0; j++) {
                    const float s = rows.score(links[j]);
                    if (s > cur_s) {
                        cur   = links[j];
                        cur_s = s;
                        moved = true;
                    }
                }
            }
        }

        if ((int64_t) visited.size() < n) {
            visited.assign(n, 0);
            epoch = 0;
        }
        if (++epoch == 0) {
            std::fill(visited.begin(), visited.end(), 0);
            epoch = 1;
        }

        // best-first search on level 0
        open .assign(1, {cur_s, cur});
        found.assign(1, {cur_s, cur});
        visited[cur] = epoch;

        while (!open.empty()) {
            const mem_candidate c = open.front();
            if (c.first < found.front().first && found.size() >= ef) {
                break;
            }
            std::pop_heap(open.begin(), open.end());
            open.pop_back();

            // all rows are asked for before the first is scored, so that they arrive while others are
            next.clear();
            const int32_t * links = link0 + (int64_t) c.second*a.m0;
            for (int32_t j = 0; j < a.m0 && links[j] >= 0; j++) {
                if (visited[links[j]] != epoch) {
                    visited[links[j]] = epoch;
                    rows.prefetch(links[j]);
                    next.push_back(links[j]);
                }
            }

            for (const int32_t i : next) {
                const float s = rows.score(i);
                if (found.size() < ef || s > found.front().first) {
                    mem_prefetch(link0 + (int64_t) i*a.m0, a.m0*sizeof(int32_t)); // it is likely to be expanded
                    open.push_back({s, i});
                    std::push_heap(open.begin(), open.end());
                    keep(s, i, ef);
                }
            }
        }
    }

    // the entry with the largest key*q + bias
    mem_candidate best(const mem_args & a, int64_t h, const float * x) {
        hnsw(a, rows(a, h, x, 1.0f), h, MEM_HNSW_EF);
        return *std::max_element(found.begin(), found.end());
    }

    // the top_k entries with the largest scale*key*q + bias, unordered, to found
    void top(const mem_args & a, int64_t h, const float * x) {
        const mem_rows r = rows(a, h, x, a.scale);
        const size_t k = a.top_k;
        if (a.n(h) > a.top_k && a.use_hnsw(h)) {
            hnsw(a, r, h, std::max(MEM_HNSW_EF_TOKEN, 2*k));
            while (found.size() > k) {
                std::pop_heap(found.begin(), found.end(), std::greater<mem_candidate>());
                found.pop_back();
            }
        } else {
            scan(r, a.n(h), k);
        }
    }
};

const float * mem_state_in(const mem_args & a, int64_t h, int64_t j) {
    if (!a.state) {
        return nullptr;
    }
    return (const float *) ((const char *) a.state->data + (h*a.n_gqa + j/a.n_tokens)*a.state->nb[1] + (j%a.n_tokens)*a.state->nb[2]);
}

// the state of a query whose best entry is known
void mem_take(const mem_args & a, int64_t h, int64_t j, const mem_candidate & best, const mem_work & work, ggml_tensor * dst) {
    const float * in  = mem_state_in(a, h, j);
    float       * out = a.result(dst, h, j);

    auto row = [&]() {
        mem_to_f32(a.value, a.offset[h] + best.second, 1, work.v);
        return work.v;
    };
    auto lse = [&]() { return ((const float *) a.lse->data)[a.offset[h] + best.second]; };

    if (a.kind == GGML_MEM_RESIDUAL) {
        memcpy(out, in, (a.n_embd_v + 1)*sizeof(float));
        out[a.n_embd_v] += a.gain;
        if (a.n(h) > 0) {
            ggml_vec_add_f32(a.n_embd_v, out, out, row());
            out[a.n_embd_v] += lse();
        }
        return;
    }

    work.acc.clear(1);
    if (a.n(h) > 0) {
        work.acc.add(0, a.kind == GGML_MEM_CENTROID ? lse() : best.first, 1.0f, row());
    }
    work.acc.finish(0, a.gain, in, out);
}

// the state of a query over its top_k entries
void mem_take_top(const mem_args & a, int64_t h, int64_t j, const mem_work & work, mem_search & search, ggml_tensor * dst) {
    work.acc.clear(1);
    if (a.n(h) > 0) {
        search.top(a, h, a.query(h, j));
        for (const auto & [s, i] : search.found) {
            mem_to_f32(a.value, a.offset[h] + i, 1, work.v);
            work.acc.add(0, s, 1.0f, work.v);
        }
    }
    work.acc.finish(0, a.gain, mem_state_in(a, h, j), a.result(dst, h, j));
}

// the share of a thread of the rows of all KV heads: f(h, i0, i1)
template <typename F>
void mem_for_rows(const mem_args & a, const ggml_compute_params * params, F f) {
    const int64_t n     = a.offset[a.n_head_kv];
    const int64_t first = n*params->ith/params->nth;
    const int64_t last  = n*(params->ith + 1)/params->nth;

    for (int64_t h = 0; h < a.n_head_kv; h++) {
        f(h, std::max<int64_t>(first, a.offset[h]), std::min<int64_t>(last, a.offset[h + 1]));
    }
}

// the share of a thread of the queries of all KV heads, in blocks: f(h, j0, n)
template <typename F>
void mem_for_queries(const mem_args & a, const ggml_compute_params * params, F f) {
    const int64_t n_q     = a.n_gqa*a.n_tokens;
    const int64_t n_block = (n_q + MEM_TILE_QUERIES - 1)/MEM_TILE_QUERIES;

    for (int64_t i = params->ith; i < a.n_head_kv*n_block; i += params->nth) {
        const int64_t j0 = i%n_block*MEM_TILE_QUERIES;
        f(i/n_block, j0, std::min(MEM_TILE_QUERIES, n_q - j0));
    }
}

// few queries: each thread scans its share of the rows of all heads, then the best of the shares is taken
void mem_lookup_split(const mem_args & a, const ggml_compute_params * params, const mem_work & work, mem_search & search, void * partials, ggml_tensor * dst) {
    const int64_t n_q = a.n_gqa*a.n_tokens;

    auto partial = [&](int64_t ith, int64_t h) { return (mem_candidate *) partials + (ith*a.n_head_kv + h)*n_q; };

    mem_for_rows(a, params, [&](int64_t h, int64_t i0, int64_t i1) {
        mem_candidate * best = partial(params->ith, h);
        std::fill(best, best + n_q, mem_candidate(-INFINITY, 0));
        if (i0 < i1 && !a.use_hnsw(h)) {
            work.load(a, h, 0, n_q);
            work.scan(a, h, i0, i1, n_q, best);
        }
    });

    ggml_barrier(params->threadpool);

    for (int64_t i = params->ith; i < a.n_head_kv*n_q; i += params->nth) {
        const int64_t h = i/n_q;
        const int64_t j = i%n_q;

        mem_candidate best = partial(0, h)[j];
        if (a.use_hnsw(h)) {
            best = search.best(a, h, a.query(h, j));
        } else {
            for (int t = 1; t < params->nth; t++) {
                if (partial(t, h)[j].first > best.first) {
                    best = partial(t, h)[j];
                }
            }
        }
        mem_take(a, h, j, best, work, dst);
    }
}

void mem_lookup(const mem_args & a, const ggml_compute_params * params, const mem_work & work, mem_search & search, ggml_tensor * dst) {
    mem_for_queries(a, params, [&](int64_t h, int64_t j0, int64_t n) {
        mem_candidate best[MEM_TILE_QUERIES];
        if (a.use_hnsw(h)) {
            for (int64_t j = 0; j < n; j++) {
                best[j] = search.best(a, h, a.query(h, j0 + j));
            }
        } else {
            std::fill(best, best + n, mem_candidate(-INFINITY, 0));
            work.load(a, h, j0, n);
            work.scan(a, h, a.offset[h], a.offset[h + 1], n, best);
        }
        for (int64_t j = 0; j < n; j++) {
            mem_take(a, h, j0 + j, best[j], work, dst);
        }
    });
}

// few queries: each thread attends its share of the rows of all heads, then the shares are merged
void mem_attend_split(const mem_args & a, const ggml_compute_params * params, const mem_work & work, float * partials, ggml_tensor * dst) {
    const int64_t n_q    = a.n_gqa*a.n_tokens;
    const int64_t stride = n_q*(a.n_embd_v + 2);

    auto partial = [&](int64_t ith, int64_t h) {
        float * p = partials + (ith*a.n_head_kv + h)*stride;
        return mem_acc{ p, p + n_q, p + 2*n_q, a.n_embd_v };
    };

    mem_for_rows(a, params, [&](int64_t h, int64_t i0, int64_t i1) {
        mem_work part = work;
        part.acc = partial(params->ith, h);
        part.acc.clear(n_q);
        if (i0 < i1) {
            part.load(a, h, 0, n_q);
            part.attend(a, i0, i1, n_q);
        }
    });

    ggml_barrier(params->threadpool);

    for (int64_t i = params->ith; i < a.n_head_kv*n_q; i += params->nth) {
        const int64_t h = i/n_q;
        const int64_t j = i%n_q;

        work.acc.clear(1);
        for (int t = 0; t < params->nth; t++) {
            const mem_acc p = partial(t, h);
            work.acc.add(0, p.max[j], p.sum[j], p.o + j*a.n_embd_v);
        }
        work.acc.finish(0, a.gain, mem_state_in(a, h, j), a.result(dst, h, j));
    }
}

void mem_attend(const mem_args & a, const ggml_compute_params * params, const mem_work & work, ggml_tensor * dst) {
    mem_for_queries(a, params, [&](int64_t h, int64_t j0, int64_t n) {
        work.acc.clear(n);
        work.load(a, h, j0, n);
        work.attend(a, a.offset[h], a.offset[h + 1], n);
        for (int64_t j = 0; j < n; j++) {
            work.acc.finish(j, a.gain, mem_state_in(a, h, j0 + j), a.result(dst, h, j0 + j));
        }
    });
}

void mem_merge(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * a = dst->src[1];
    const ggml_tensor * b = dst->src[0];

    const int64_t n = dst->ne[0] - 1;
    const size_t  stride = (n + 2 + CACHE_LINE_SIZE/sizeof(float))*params->ith;
    float * wdata = (float *) params->wdata + stride;
    const mem_acc acc = { wdata, wdata + 1, wdata + 2, n };

    for (int64_t i = params->ith; i < ggml_nrows(dst); i += params->nth) {
        auto row = [&](const ggml_tensor * t) { return (float *) ((char *) t->data + i%t->ne[1]*t->nb[1] + i/t->ne[1]*t->nb[2]); };
        acc.clear(1);
        acc.add(0, row(a)[n], 1.0f, row(a));
        acc.finish(0, 0.0f, row(b), row(dst));
    }
}

bool mem_split(const mem_args & a) {
    return a.n_tokens <= MEM_SPLIT_MAX_TOKENS && a.n_gqa*a.n_tokens <= MEM_TILE_QUERIES;
}

} // namespace

size_t ggml_mem_state_work_size(const ggml_tensor * dst, int n_tasks) {
    if (ggml_get_op_params_i32(dst, 0) == GGML_MEM_MERGE) {
        return n_tasks*(dst->ne[0] + 1 + CACHE_LINE_SIZE/sizeof(float))*sizeof(float);
    }

    const mem_args a(dst);
    size_t n = n_tasks*mem_work::size(a.n_embd_k, a.n_embd_v);
    if (mem_split(a)) {
        n += n_tasks*a.n_head*a.n_tokens*(a.n_embd_v + 2); // of states, or of candidates, which are smaller
    }
    return n*sizeof(float);
}

void ggml_compute_forward_mem_state(const ggml_compute_params * params, ggml_tensor * dst) {
    if (ggml_get_op_params_i32(dst, 0) == GGML_MEM_MERGE) {
        mem_merge(params, dst);
        return;
    }

    const mem_args a(dst);

    float * wdata = (float *) params->wdata;
    const size_t size = mem_work::size(a.n_embd_k, a.n_embd_v);
    const mem_work work(a, wdata + params->ith*size);

    float * partials = wdata + params->nth*size;

    if (a.kind == GGML_MEM_ANCHOR) {
        if (mem_split(a)) {
            mem_attend_split(a, params, work, partials, dst);
        } else {
            mem_attend(a, params, work, dst);
        }
        return;
    }

    thread_local mem_search search;

    if (a.kind == GGML_MEM_TOKEN) {
        // the queries of a head follow each other, so that a thread keeps to few tables
        const int64_t n_q = a.n_gqa*a.n_tokens;
        const int64_t n   = a.n_head_kv*n_q;
        for (int64_t i = n*params->ith/params->nth; i < n*(params->ith + 1)/params->nth; i++) {
            mem_take_top(a, i/n_q, i%n_q, work, search, dst);
        }
    } else if (mem_split(a)) {
        mem_lookup_split(a, params, work, search, partials, dst);
    } else {
        mem_lookup(a, params, work, search, dst);
    }
}
