// A tile of rows of a memory and a tile of queries: their scores, and the states that come of them
#pragma once

#include "mem-args.h"
#include "mem-best.h"
#include "mem-kernels.h"

#include "ggml-cpu-impl.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

constexpr int64_t MEM_TILE_QUERIES = 128;

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

    // makes room for terms of up to s; returns the maximum that terms are relative to
    float raise(int64_t j, float s) const {
        if (s > max[j]) {
            const float c = expf(max[j] - s);
            ggml_vec_scale_f32(n_embd_v, o + j*n_embd_v, c);
            sum[j] *= c;
            max[j]  = s;
        }
        return max[j];
    }

    // adds terms, relative to s: weight is their sum, v the sum of their weighted values
    void add(int64_t j, float s, float weight, const float * v) const {
        if (s == -INFINITY || weight == 0.0f) {
            return;
        }
        const float c = expf(s - raise(j, s));
        ggml_vec_mad_f32(n_embd_v, o + j*n_embd_v, v, c);
        sum[j] += c*weight;
    }

    // writes the state (o, lse) to out, merged with the state in, which may be nullptr; an empty state is (0, -inf)
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

// the buffers of one thread, for up to n_tile queries
struct mem_work {
    float * q;     // [n_tile][n_embd_k]
    float * k;     // [MEM_TURN_ROWS][n_embd_k] keys in F32, or what mem_kernels prepares of few queries
    float * tile;  // [n_embd_k][MEM_TILE_ROWS] transposed keys, then [MEM_TILE_ROWS][n_embd_v] values
    float * s;     // [n_tile][MEM_TILE_ROWS] scores
    mem_acc acc;   // [n_tile]

    static int64_t n_tile(const mem_args & a) { return std::min(MEM_TILE_QUERIES, a.n_gqa*a.n_tokens); }

    static int64_t n_embd(const mem_args & a) { return std::max(a.n_embd_k, a.n_embd_v); }

    static size_t size(const mem_args & a) {
        return n_tile(a)*(a.n_embd_k + MEM_TILE_ROWS + a.n_embd_v + 2) + MEM_TURN_ROWS*a.n_embd_k + n_embd(a)*MEM_TILE_ROWS + 2*CACHE_LINE_SIZE/sizeof(float);
    }

    // begins at a cache line, as a vector that crosses lines costs two loads
    mem_work(const mem_args & a, float * data) {
        data = (float *) GGML_PAD((uintptr_t) data, CACHE_LINE_SIZE);
        auto take = [&](int64_t n) {
            float * res = data;
            data += n;
            return res;
        };
        const int64_t n = n_tile(a);
        tile = take(n_embd(a)*MEM_TILE_ROWS);
        s    = take(n*MEM_TILE_ROWS);
        q    = take(n*a.n_embd_k);
        k    = take(MEM_TURN_ROWS*a.n_embd_k);
        acc  = { take(n), take(n), take(n*a.n_embd_v), a.n_embd_v };
    }

    // loads the queries j0 .. j0 + n_q - 1 of a KV head, scaled
    void load(const mem_args & a, int64_t h, int64_t j0, int64_t n_q) const {
        for (int64_t j = 0; j < n_q; j++) {
            const float * from = a.query(h, j0 + j);
            for (int64_t c = 0; c < a.n_embd_k; c++) {
                q[j*a.n_embd_k + c] = a.scale*from[c];
            }
        }
        if (n_q < MEM_GEMM_MIN_QUERIES) {
            mem_kernels::prepare(a.key, q, n_q, k);
        }
    }

    // s = key*q + bias of n rows from i0 on, for n_q loaded queries; -INFINITY fills up the tile
    void score(const mem_args & a, int64_t i0, int64_t n, int64_t n_q) const {
        const float * bias = (const float *) a.bias->data + i0;
        if (n_q < MEM_GEMM_MIN_QUERIES) {
            mem_kernels::dot(a.key, i0, n, q, n_q, k, s);
            for (int64_t j = 0; j < n_q; j++) {
                ggml_vec_acc_f32(n, s + j*MEM_TILE_ROWS, bias);
            }
        } else {
            transpose(a.key, i0, n);
            for (int64_t j = 0; j < n_q; j++) {
                memcpy(s + j*MEM_TILE_ROWS, bias, n*sizeof(float));
            }
            mem_kernels::gemm(s, q, tile, n_q, a.n_embd_k, MEM_TILE_ROWS);
        }
        for (int64_t j = 0; j < n_q; j++) {
            std::fill(s + j*MEM_TILE_ROWS + n, s + (j + 1)*MEM_TILE_ROWS, -INFINITY);
        }
    }

    // tile = n rows from i0 on, transposed; 0 fills up the tile
    void transpose(const ggml_tensor * key, int64_t i0, int64_t n) const {
        const int64_t d = key->ne[0];
        if (n < MEM_TILE_ROWS) {
            memset(tile, 0, d*MEM_TILE_ROWS*sizeof(float));
        }
        for (int64_t i = 0; i < n; i += MEM_TURN_ROWS) {
            const int64_t m = std::min(MEM_TURN_ROWS, n - i);
            mem_to_f32(key, i0 + i, m, k);
            for (int64_t c = 0; c < d; c++) {
                for (int64_t r = 0; r < m; r++) {
                    tile[c*MEM_TILE_ROWS + i + r] = k[r*d + c];
                }
            }
        }
    }

    // adds the attention of n_q loaded queries over the rows i0 .. i1 - 1 to acc
    void attend(const mem_args & a, int64_t i0, int64_t i1, int64_t n_q) const {
        const int64_t d = a.n_embd_v;
        for (; i0 < i1; i0 += MEM_TILE_ROWS) {
            const int64_t n = std::min(MEM_TILE_ROWS, i1 - i0);

            score(a, i0, n, n_q);

            for (int64_t j = 0; j < n_q; j++) {
                float * row = s + j*MEM_TILE_ROWS;
                acc.sum[j] += ggml_vec_soft_max_f32(MEM_TILE_ROWS, row, row, acc.raise(j, mem_kernels::tile_max(row))); // its weights behind n are 0
            }

            if (n_q < MEM_GEMM_MIN_QUERIES) {
                mem_kernels::weigh(a.value, i0, n, s, n_q, acc.o);
            } else {
                mem_to_f32(a.value, i0, n, tile);
                memset(tile + n*d, 0, (MEM_TILE_ROWS - n)*d*sizeof(float));
                mem_kernels::gemm(acc.o, s, tile, n_q, MEM_TILE_ROWS, d);
            }
        }
    }

    // updates the best entry of KV head h of each of n_q loaded queries by the rows i0 .. i1 - 1
    void scan(const mem_args & a, int64_t h, int64_t i0, int64_t i1, int64_t n_q, mem_candidate * best) const {
        for (; i0 < i1; i0 += MEM_TILE_ROWS) {
            const int64_t n = std::min(MEM_TILE_ROWS, i1 - i0);

            score(a, i0, n, n_q);

            for (int64_t j = 0; j < n_q; j++) {
                const float * row = s + j*MEM_TILE_ROWS;
                const float   top = mem_kernels::tile_max(row);
                if (top > best[j].score) {
                    best[j] = { top, (int32_t) (i0 - a.offset[h] + (std::find(row, row + n, top) - row)) };
                }
            }
        }
    }
};
