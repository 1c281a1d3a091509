// What GGML_OP_MEM_STATE computes with rows: generic versions, parts of which an architecture replaces
#pragma once

#include "mem-rows.h"

#include "quants.h"
#include "simd-gemm.h"

#include <algorithm>
#include <cmath>

// rows that are transposed at a time for a matrix product
constexpr int64_t MEM_TURN_ROWS = 16;

// with fewer queries than this, a dot product per row and query beats a matrix product with the transposed rows
constexpr int64_t MEM_GEMM_MIN_QUERIES = 8;

// max[l] = the maximum of the numbers l, l + LANES .. of n
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

//
// a few rows and up to 4 queries
//

// sum[r*NQ + j] = k[r]*q[j] for NR rows of size d and NQ queries, NR*NQ is 4 at most
template <typename T, int NR, int NQ>
static inline void mem_dot(int64_t d, const char * const * k, const float * q, float * sum) {
    mem_vec acc[NR*NQ];
    for (int i = 0; i < NR*NQ; i++) {
        acc[i] = mem_zero();
    }
    constexpr int64_t step = T::scaled ? QK8_0 : MEM_VEC;
    int64_t c = 0;
    for (; c + step <= d; c += step) {
        for (int r = 0; r < NR; r++) {
            const auto * x = T::column(k[r], c);
            mem_vec part[NQ];
            for (int j = 0; j < NQ; j++) {
                part[j] = T::scaled ? mem_zero() : acc[r*NQ + j];
            }
            for (int64_t l = 0; l < step; l += MEM_VEC) {
                const mem_vec y = T::load(x, l);
                for (int j = 0; j < NQ; j++) {
                    part[j] = mem_fma(part[j], y, mem_load(q + j*d + c + l));
                }
            }
            const mem_vec scale = mem_set1(T::scale(k[r], c));
            for (int j = 0; j < NQ; j++) {
                acc[r*NQ + j] = T::scaled ? mem_fma(acc[r*NQ + j], part[j], scale) : part[j];
            }
        }
    }
    mem_vec_ops::sum_lanes<NR*NQ>(acc, sum);
    for (; c < d; c++) {
        for (int r = 0; r < NR; r++) {
            const float x = T::value(T::column(k[r], c))*T::scale(k[r], c);
            for (int j = 0; j < NQ; j++) {
                sum[r*NQ + j] += x*q[j*d + c];
            }
        }
    }
}

// o[j] += sum_i s[j*stride + i]*v[i] for R vectors of columns from c on
template <typename T, int NQ, int R>
static void mem_weigh_columns(int64_t n, int64_t c, int64_t d, const float * s, int64_t stride, const char * v, size_t row_size, float * o) {
    mem_vec acc[NQ][R];
    for (int j = 0; j < NQ; j++) {
        for (int r = 0; r < R; r++) {
            acc[j][r] = mem_load(o + j*d + c + r*MEM_VEC);
        }
    }
    for (int64_t i = 0; i < n; i++, v += row_size) {
        const auto * v_c = T::column(v, c);
        mem_vec x[R];
        for (int r = 0; r < R; r++) {
            x[r] = T::load(v_c, r*MEM_VEC);
        }
        for (int j = 0; j < NQ; j++) {
            const mem_vec w = mem_set1(s[j*stride + i]);
            for (int r = 0; r < R; r++) {
                acc[j][r] = mem_fma(acc[j][r], x[r], w);
            }
        }
    }
    for (int j = 0; j < NQ; j++) {
        for (int r = 0; r < R; r++) {
            mem_store(o + j*d + c + r*MEM_VEC, acc[j][r]);
        }
    }
}

// o[j] += sum_i s[j*MEM_TILE_ROWS + i]*v[i] for n rows of size d, one tile at most, and NQ queries
template <typename T, int NQ>
static void mem_weigh(int64_t n, int64_t d, const float * s, const char * v, size_t row_size, float * o) {
    constexpr int R = std::min(NQ < 3 ? 4 : 2, QK8_0/MEM_VEC); // the sums fit into 16 registers, and R divides a block
    int64_t c = 0;
    if (T::scaled) {
        for (; c < d; c += QK8_0) {
            float scale[MEM_TILE_ROWS];
            float w[NQ*MEM_TILE_ROWS];
            for (int64_t i = 0; i < n; i++) {
                scale[i] = T::scale(v + i*row_size, c);
            }
            for (int j = 0; j < NQ; j++) {
                for (int64_t i = 0; i < n; i++) {
                    w[j*MEM_TILE_ROWS + i] = s[j*MEM_TILE_ROWS + i]*scale[i];
                }
            }
            for (int64_t l = c; l < c + QK8_0; l += R*MEM_VEC) {
                mem_weigh_columns<T, NQ, R>(n, l, d, w, MEM_TILE_ROWS, v, row_size, o);
            }
        }
    } else {
        for (; c + R*MEM_VEC <= d; c += R*MEM_VEC) {
            mem_weigh_columns<T, NQ, R>(n, c, d, s, MEM_TILE_ROWS, v, row_size, o);
        }
        for (; c + MEM_VEC <= d; c += MEM_VEC) {
            mem_weigh_columns<T, NQ, 1>(n, c, d, s, MEM_TILE_ROWS, v, row_size, o);
        }
    }
    for (; c < d; c++) {
        for (int64_t i = 0; i < n; i++) {
            const float x = T::value(T::column(v + i*row_size, c))*T::scale(v + i*row_size, c);
            for (int j = 0; j < NQ; j++) {
                o[j*d + c] += s[j*MEM_TILE_ROWS + i]*x;
            }
        }
    }
}

//
// what an architecture may do faster: it defines mem_kernels, whose functions hide these
//
//   q  [n_q][d]             queries, fewer than MEM_GEMM_MIN_QUERIES
//   s  [n_q][MEM_TILE_ROWS] scores or weights of a tile, of which n are rows; dot may overwrite what is behind them
//   o  [n_q][d]             sums of weighted rows
//

struct mem_kernels_generic {
    // what dot needs of the queries, in work [MEM_TURN_ROWS][d]
    static void prepare(const ggml_tensor * /*key*/, const float * /*q*/, int64_t /*n_q*/, float * /*work*/) {}

    // s = key*q of n rows from i0 on
    static void dot(const ggml_tensor * key, int64_t i0, int64_t n, const float * q, int64_t n_q, const float * /*work*/, float * s) {
        const int64_t d = key->ne[0];
        mem_by_type(key, [&](auto type) {
            mem_by_four(n_q, [&](auto nq, int64_t j) {
                for (int64_t i = 0; i < n; i++) {
                    const char * row = (const char *) key->data + (i0 + i)*key->nb[1];
                    float sum[nq];
                    mem_dot<decltype(type), 1, nq>(d, &row, q + j*d, sum);
                    for (int l = 0; l < nq; l++) {
                        s[(j + l)*MEM_TILE_ROWS + i] = sum[l];
                    }
                }
            });
        });
    }

    // o += s*value of n rows from i0 on
    static void weigh(const ggml_tensor * value, int64_t i0, int64_t n, const float * s, int64_t n_q, float * o) {
        const int64_t d = value->ne[0];
        const char * rows = (const char *) value->data + i0*value->nb[1];
        mem_by_type(value, [&](auto type) {
            mem_by_four(n_q, [&](auto nq, int64_t j) {
                mem_weigh<decltype(type), nq>(n, d, s + j*MEM_TILE_ROWS, rows, value->nb[1], o + j*d);
            });
        });
    }

    // c[m][n] += a[m][k]*b[k][n]
    static void gemm(float * c, const float * a, const float * b, int64_t m, int64_t k, int64_t n) {
        simd_gemm(c, a, b, m, k, n);
    }

    // the maximum of MEM_TILE_ROWS numbers
    static float tile_max(const float * x) {
        float max[8];
        mem_max_lanes<8>(x, MEM_TILE_ROWS, max);
        return *std::max_element(max, max + 8);
    }

    // sum[r] = k[r]*q for NR rows of size d, 4 at most, all in Q8_0
    template <int NR>
    static void dot_q8_0(int64_t d, const char * const * k, const block_q8_0 * q, float * sum) {
        for (int r = 0; r < NR; r++) {
            ggml_vec_dot_q8_0_q8_0(d, sum + r, 0, k[r], 0, q, 0, 1);
        }
    }
};

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#include "arch/x86/mem-kernels.h"
#else
using mem_kernels = mem_kernels_generic;
#endif
