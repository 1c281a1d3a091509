// GGML_OP_MEM_STATE on the CPU: attention over the anchors of a memory, and lookups by scan, lists or HNSW
//
// The query heads of a KV head share its table. Few queries: each row is read in place, once for all of them. Many: rows are
// converted to F32 in tiles, and scores and sums are matrix products.

#include "mem-state.h"

#include "mem-args.h"
#include "mem-search.h"
#include "mem-tile.h"

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// up to this many tokens the rows of a table are split over the threads, above it the queries
constexpr int64_t MEM_SPLIT_MAX_TOKENS = 4;

namespace {

thread_local mem_searches mem_thread_searches; // keeps its buffers from op to op

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

// the states of the queries i0 .. i1 - 1 over the best top_k entries of each
void mem_take_top(const mem_args & a, int64_t i0, int64_t i1, const mem_work & work, mem_searches & searches, ggml_tensor * dst) {
    const int64_t n_q = a.n_gqa*a.n_tokens;

    searches.run(a, i0, i1);
    for (int64_t i = i0; i < i1; i++) {
        const int64_t h = i/n_q;
        const int64_t j = i%n_q;

        mem_search & search = searches.search[i - i0];
        if (!a.use_search(h)) {
            search.scan();
            searches.n_scored += search.n_scored;
        }
        work.acc.clear(1);
        for (size_t k = 0; k < std::min<size_t>(a.top_k, search.top.size()); k++) {
            mem_to_f32(a.value, a.offset[h] + search.top[k].entry, 1, work.tile);
            work.acc.add(0, search.top[k].score, 1.0f, work.tile);
        }
        work.acc.finish(0, a.gain, mem_state_in(a, h, j), a.result(dst, h, j));
    }
}

// calls f(h, i0, i1) for the share of a thread of the rows of all KV heads
template <typename F>
void mem_for_rows(const mem_args & a, const ggml_compute_params * params, F f) {
    const int64_t n     = a.offset[a.n_head_kv];
    const int64_t first = n*params->ith/params->nth;
    const int64_t last  = n*(params->ith + 1)/params->nth;

    for (int64_t h = 0; h < a.n_head_kv; h++) {
        f(h, std::max<int64_t>(first, a.offset[h]), std::min<int64_t>(last, a.offset[h + 1]));
    }
}

// calls f(i0, i1) for the share of a thread of n queries, at most size of them at a time
template <typename F>
void mem_for_share(int64_t n, int64_t size, const ggml_compute_params * params, F f) {
    const int64_t last = n*(params->ith + 1)/params->nth;
    for (int64_t i = n*params->ith/params->nth; i < last; i += size) {
        f(i, std::min(i + size, last));
    }
}

// calls f(h, j0, n) for the share of a thread of the queries of all KV heads, in blocks
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
            searches.n_scored += n_q*(i1 - i0);
        }
    });

    ggml_barrier(params->threadpool);

    mem_for_share(a.n_head_kv*n_q, MEM_HNSW_TURNS, params, [&](int64_t i0, int64_t i1) {
        searches.run(a, i0, i1);
        for (int64_t i = i0; i < i1; i++) {
            const int64_t h = i/n_q;
            const int64_t j = i%n_q;

            mem_candidate best = a.use_search(h) ? searches.search[i - i0].top.front() : partial(0, h)[j];
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
                    best[j + l] = searches.search[l].top.front();
                }
            }
        } else {
            work.load(a, h, j0, n);
            work.scan(a, h, a.offset[h], a.offset[h + 1], n, best);
            searches.n_scored += n*a.n(h);
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

    mem_searches & searches = mem_thread_searches;

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

int64_t ggml_backend_cpu_mem_state_n_scored(void) {
    return mem_thread_searches.n_scored;
}
