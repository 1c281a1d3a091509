// GGML_OP_MEM_STATE on the CPU: attention over the anchors of a memory, and lookups by scan, lists or HNSW
//
// The query heads of a KV head share its table. Few queries: each row is read in place, once for all of them. Many: rows are
// converted to F32 in tiles, and scores and sums are matrix products.

#include "mem-state.h"

#include "mem-args.h"
#include "mem-rows.h"
#include "mem-search.h"
#include "mem-vnni.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t MEM_TILE_QUERIES = 128;

// so many rows are transposed at a time
constexpr int64_t MEM_TURN_ROWS = 16;

// with fewer queries than this, a dot product per row and query beats a matrix product with the transposed rows
constexpr int64_t MEM_GEMM_MIN_QUERIES = 8;

// up to this many tokens the rows of a table are split over the threads, above it the queries
constexpr int64_t MEM_SPLIT_MAX_TOKENS = 4;

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

// what one thread works with, for up to n_tile queries
struct mem_work {
    float * q;     // [n_tile][n_embd_k]
    float * k;     // [MEM_TURN_ROWS][n_embd_k]
    float * tile;  // [n_embd_k][MEM_TILE_ROWS] keys transposed, then [MEM_TILE_ROWS][n_embd_v] values
    float * s;     // [n_tile][MEM_TILE_ROWS]
    mem_acc acc;   // [n_tile]

    static int64_t n_tile(const mem_args & a) { return std::min(MEM_TILE_QUERIES, a.n_gqa*a.n_tokens); }

    static int64_t n_embd(const mem_args & a) { return std::max(a.n_embd_k, a.n_embd_v); }

    static size_t size(const mem_args & a) {
        return n_tile(a)*(a.n_embd_k + MEM_TILE_ROWS + a.n_embd_v + 2) + MEM_TURN_ROWS*a.n_embd_k + n_embd(a)*MEM_TILE_ROWS + 2*CACHE_LINE_SIZE/sizeof(float);
    }

    // from the next cache line on: a vector that crosses lines costs two loads, and data may be anywhere
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

#if defined(MEM_VNNI)
    // in place of k, which few queries do not need
    mem_query_block * q_bytes() const {
        static_assert(MEM_GEMM_MIN_QUERIES*sizeof(mem_query_block) <= MEM_TURN_ROWS*QK8_0*sizeof(float), "no room");
        return (mem_query_block *) k;
    }
#endif

    // queries j0 .. j0 + n_q - 1 of a KV head, scaled
    void load(const mem_args & a, int64_t h, int64_t j0, int64_t n_q) const {
        for (int64_t j = 0; j < n_q; j++) {
            const float * from = a.query(h, j0 + j);
            for (int64_t c = 0; c < a.n_embd_k; c++) {
                q[j*a.n_embd_k + c] = a.scale*from[c];
            }
        }
#if defined(MEM_VNNI)
        if (n_q < MEM_GEMM_MIN_QUERIES && a.key->type == GGML_TYPE_Q8_0) {
            for (int64_t i = 0; i < n_q*a.n_embd_k; i += QK8_0) {
                q_bytes()[i/QK8_0].set([&](int64_t c) { return _mm512_loadu_ps(q + i + c); });
            }
        }
#endif
    }

    // key*q of n rows from i0 on, for few loaded queries, to s
    void dot(const ggml_tensor * key, int64_t i0, int64_t n, int64_t n_q) const {
        const int64_t d = key->ne[0];
        const char * rows = (const char *) key->data + i0*key->nb[1];
#if defined(MEM_VNNI)
        if (key->type == GGML_TYPE_Q8_0) {
            mem_by_four(n_q, [&](auto nq, int64_t j) {
                mem_dot_vnni<nq>(n, d, rows, key->nb[1], q_bytes() + j*d/QK8_0, s + j*MEM_TILE_ROWS);
            });
            return;
        }
#endif
        mem_by_type(key, [&](auto type) {
            using row_type = decltype(type);
            mem_by_four(n_q, [&](auto nq, int64_t j) {
                int64_t i = 0;
#if defined(__AVX512F__)
                if constexpr (!row_type::scaled) {
                    for (; i + 4 <= n && d % 32 == 0; i += 4) {
                        mem_dot_rows<row_type, nq>(d, rows + i*key->nb[1], key->nb[1], q + j*d, s + j*MEM_TILE_ROWS + i, MEM_TILE_ROWS);
                    }
                }
#endif
                for (; i < n; i++) {
                    const char * row = rows + i*key->nb[1];
                    float sum[nq];
                    mem_dot<row_type, 1, nq>(d, &row, q + j*d, sum);
                    for (int l = 0; l < nq; l++) {
                        s[(j + l)*MEM_TILE_ROWS + i] = sum[l];
                    }
                }
            });
        });
    }

    // o += s*value of n rows from i0 on, for few queries
    void weigh(const ggml_tensor * value, int64_t i0, int64_t n, int64_t n_q) const {
        const int64_t d = value->ne[0];
        const char * rows = (const char *) value->data + i0*value->nb[1];
#if defined(MEM_VNNI)
        if (value->type == GGML_TYPE_Q8_0) {
            mem_by_four(n_q, [&](auto nq, int64_t j) {
                mem_weigh_vnni<nq>(n, d, s + j*MEM_TILE_ROWS, rows, value->nb[1], acc.o + j*d);
            });
            return;
        }
#endif
        mem_by_type(value, [&](auto type) {
            mem_by_four(n_q, [&](auto nq, int64_t j) {
                mem_weigh<decltype(type), nq>(n, d, s + j*MEM_TILE_ROWS, MEM_TILE_ROWS, rows, value->nb[1], acc.o + j*d);
            });
        });
    }

    // key*q + bias of n rows from i0 on, for n_q loaded queries, to s; -INFINITY fills up the tile
    void score(const mem_args & a, int64_t i0, int64_t n, int64_t n_q) const {
        const int64_t d    = a.n_embd_k;
        const float * bias = (const float *) a.bias->data + i0;
        if (n_q < MEM_GEMM_MIN_QUERIES) {
            dot(a.key, i0, n, n_q);
            for (int64_t j = 0; j < n_q; j++) {
                ggml_vec_acc_f32(n, s + j*MEM_TILE_ROWS, bias);
            }
        } else {
            if (n < MEM_TILE_ROWS) {
                memset(tile, 0, d*MEM_TILE_ROWS*sizeof(float));
            }
            for (int64_t i = 0; i < n; i += MEM_TURN_ROWS) {
                const int64_t m = std::min(MEM_TURN_ROWS, n - i);
                mem_to_f32(a.key, i0 + i, m, k);
                for (int64_t c = 0; c < d; c++) {
                    for (int64_t r = 0; r < m; r++) {
                        tile[c*MEM_TILE_ROWS + i + r] = k[r*d + c];
                    }
                }
            }
            for (int64_t j = 0; j < n_q; j++) {
                memcpy(s + j*MEM_TILE_ROWS, bias, n*sizeof(float));
            }
            mem_gemm(s, q, tile, n_q, d, MEM_TILE_ROWS);
        }
        for (int64_t j = 0; j < n_q; j++) {
            std::fill(s + j*MEM_TILE_ROWS + n, s + (j + 1)*MEM_TILE_ROWS, -INFINITY);
        }
    }

    // attention of n_q loaded queries over the rows i0 .. i1 - 1
    void attend(const mem_args & a, int64_t i0, int64_t i1, int64_t n_q) const {
        const int64_t d = a.n_embd_v;
        for (; i0 < i1; i0 += MEM_TILE_ROWS) {
            const int64_t n = std::min(MEM_TILE_ROWS, i1 - i0);

            score(a, i0, n, n_q);

            for (int64_t j = 0; j < n_q; j++) {
                float * row = s + j*MEM_TILE_ROWS;
                acc.sum[j] += ggml_vec_soft_max_f32(MEM_TILE_ROWS, row, row, acc.raise(j, mem_tile_max(row))); // 0 behind n
            }

            if (n_q < MEM_GEMM_MIN_QUERIES) {
                weigh(a.value, i0, n, n_q);
            } else {
                mem_to_f32(a.value, i0, n, tile);
                memset(tile + n*d, 0, (MEM_TILE_ROWS - n)*d*sizeof(float));
                mem_gemm(acc.o, s, tile, n_q, MEM_TILE_ROWS, d);
            }
        }
    }

    // the entry of KV head h with the largest score among the rows i0 .. i1 - 1, for n_q loaded queries
    void scan(const mem_args & a, int64_t h, int64_t i0, int64_t i1, int64_t n_q, mem_candidate * best) const {
        for (; i0 < i1; i0 += MEM_TILE_ROWS) {
            const int64_t n = std::min(MEM_TILE_ROWS, i1 - i0);

            score(a, i0, n, n_q);

            for (int64_t j = 0; j < n_q; j++) {
                const float * row = s + j*MEM_TILE_ROWS;
                const float   top = mem_tile_max(row);
                if (top > best[j].score) {
                    best[j] = { top, (int32_t) (i0 - a.offset[h] + (std::find(row, row + n, top) - row)) };
                }
            }
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
        mem_to_f32(a.value, a.offset[h] + best.entry, 1, work.tile);
        return work.tile;
    };
    auto lse = [&]() { return ((const float *) a.lse->data)[a.offset[h] + best.entry]; };

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
        work.acc.add(0, a.kind == GGML_MEM_CENTROID ? lse() : best.score, 1.0f, row());
    }
    work.acc.finish(0, a.gain, in, out);
}

// the states of queries i0 .. i1 - 1 over the top_k entries of each
void mem_take_top(const mem_args & a, int64_t i0, int64_t i1, const mem_work & work, mem_searches & searches, ggml_tensor * dst) {
    const int64_t n_q = a.n_gqa*a.n_tokens;

    searches.run(a, i0, i1);
    for (int64_t i = i0; i < i1; i++) {
        const int64_t h = i/n_q;
        const int64_t j = i%n_q;

        mem_search & search = searches.search[i - i0];
        if (!a.use_search(h)) {
            search.scan();
        }
        work.acc.clear(1);
        for (size_t k = 0; k < std::min<size_t>(a.top_k, search.found.size()); k++) {
            mem_to_f32(a.value, a.offset[h] + search.found[k].entry, 1, work.tile);
            work.acc.add(0, search.found[k].score, 1.0f, work.tile);
        }
        work.acc.finish(0, a.gain, mem_state_in(a, h, j), a.result(dst, h, j));
    }
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

// the share of a thread of n queries, in turns of size: f(i0, i1)
template <typename F>
void mem_for_share(int64_t n, int64_t size, const ggml_compute_params * params, F f) {
    const int64_t last = n*(params->ith + 1)/params->nth;
    for (int64_t i = n*params->ith/params->nth; i < last; i += size) {
        f(i, std::min(i + size, last));
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
void mem_lookup_split(const mem_args & a, const ggml_compute_params * params, const mem_work & work, mem_searches & searches, void * partials, ggml_tensor * dst) {
    const int64_t n_q = a.n_gqa*a.n_tokens;

    auto partial = [&](int64_t ith, int64_t h) { return (mem_candidate *) partials + (ith*a.n_head_kv + h)*n_q; };

    mem_for_rows(a, params, [&](int64_t h, int64_t i0, int64_t i1) {
        mem_candidate * best = partial(params->ith, h);
        std::fill(best, best + n_q, mem_candidate());
        if (i0 < i1 && !a.use_search(h)) {
            work.load(a, h, 0, n_q);
            work.scan(a, h, i0, i1, n_q, best);
        }
    });

    ggml_barrier(params->threadpool);

    mem_for_share(a.n_head_kv*n_q, MEM_HNSW_TURNS, params, [&](int64_t i0, int64_t i1) {
        searches.run(a, i0, i1);
        for (int64_t i = i0; i < i1; i++) {
            const int64_t h = i/n_q;
            const int64_t j = i%n_q;

            mem_candidate best = a.use_search(h) ? searches.search[i - i0].found.front() : partial(0, h)[j];
            for (int t = 1; t < params->nth; t++) {
                if (partial(t, h)[j].score > best.score) {
                    best = partial(t, h)[j];
                }
            }
            mem_take(a, h, j, best, work, dst);
        }
    });
}

void mem_lookup(const mem_args & a, const ggml_compute_params * params, const mem_work & work, mem_searches & searches, ggml_tensor * dst) {
    const int64_t n_q = a.n_gqa*a.n_tokens;

    mem_for_queries(a, params, [&](int64_t h, int64_t j0, int64_t n) {
        mem_candidate best[MEM_TILE_QUERIES];
        if (a.use_search(h)) {
            for (int64_t j = 0; j < n; j += MEM_HNSW_TURNS) {
                const int64_t m = std::min(MEM_HNSW_TURNS, n - j);
                searches.run(a, h*n_q + j0 + j, h*n_q + j0 + j + m);
                for (int64_t l = 0; l < m; l++) {
                    best[j + l] = searches.search[l].found.front();
                }
            }
        } else {
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
    size_t n = n_tasks*mem_work::size(a);
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
    const size_t size = mem_work::size(a);
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

    thread_local mem_searches searches;

    if (a.kind == GGML_MEM_TOKEN) {
        mem_for_share(a.n_head*a.n_tokens, MEM_HNSW_TURNS, params, [&](int64_t i0, int64_t i1) {
            mem_take_top(a, i0, i1, work, searches, dst);
        });
    } else if (mem_split(a)) {
        mem_lookup_split(a, params, work, searches, partials, dst);
    } else {
        mem_lookup(a, params, work, searches, dst);
    }
}
