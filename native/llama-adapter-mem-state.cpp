// the attention state of a memory, on the CPU: exact scan or HNSW over the centroids, attention over the anchors

#include "llama-adapter-mem.h"

#include "llama-model.h"

#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>
#include <vector>

namespace {

// number of candidates that the HNSW search keeps on level 0; recall@1 is measured in tests/test_lookup.py
constexpr size_t MEM_HNSW_EF = 12;

// rows of a table, scored against one query
struct mem_rows {
    const char  * key;
    const float * bias;
    size_t        row_size;
    int64_t       n_embd;
    ggml_vec_dot_t vec_dot;
    const void  * q; // converted to the type that vec_dot wants

    float dot(int64_t i) const {
        float s;
        vec_dot((int) n_embd, &s, 0, key + i*row_size, 0, q, 0, 1);
        return s;
    }

    float score(int64_t i) const {
        return dot(i) + bias[i];
    }

    void prefetch(int64_t i) const {
#if defined(__GNUC__)
        for (size_t offs = 0; offs < row_size; offs += 64) {
            __builtin_prefetch(key + i*row_size + offs);
        }
#else
        GGML_UNUSED(i);
#endif
    }
};

using mem_candidate = std::pair<float, int32_t>; // score, entry

struct mem_scratch {
    std::vector<mem_candidate> open;  // HNSW: to be expanded, a max-heap
    std::vector<mem_candidate> found; // HNSW: the best so far, a min-heap
    std::vector<int32_t>       next;  // HNSW: neighbours not visited yet

    std::vector<uint8_t>  q;       // one query row as F16
    std::vector<float>    value;   // one value row as F32
    std::vector<float>    acc;     // [n_embd_head_v]
    std::vector<uint32_t> visited; // per entry, equal to epoch when visited in this search
    uint32_t              epoch = 0;
};

// the state under construction: sum_i exp(s_i - max) v_i and sum_i exp(s_i - max)
struct mem_acc {
    float   max = -INFINITY;
    float   sum = 0.0f;
    float * o;
    int64_t n;

    void add(float s, const float * v) {
        if (s == -INFINITY) {
            return;
        }
        if (s > max) {
            const float c = expf(max - s);
            for (int64_t i = 0; i < n; i++) {
                o[i] = o[i]*c + v[i];
            }
            sum = sum*c + 1.0f;
            max = s;
        } else {
            const float c = expf(s - max);
            for (int64_t i = 0; i < n; i++) {
                o[i] += c*v[i];
            }
            sum += c;
        }
    }
};

mem_rows mem_rows_of(const llama_adapter_mem_entries & entries, int64_t h, const float * q, mem_scratch & scratch) {
    const ggml_tensor * key = entries.key;

    const auto * traits = ggml_get_type_traits_cpu(key->type);

    mem_rows res;
    res.key      = (const char *) key->data + entries.offset[h]*key->nb[1];
    res.bias     = (const float *) entries.bias->data + entries.offset[h];
    res.row_size = key->nb[1];
    res.n_embd   = key->ne[0];
    res.vec_dot  = traits->vec_dot;
    res.q        = q;

    if (traits->vec_dot_type != GGML_TYPE_F32) {
        scratch.q.resize(ggml_row_size(traits->vec_dot_type, res.n_embd));
        ggml_get_type_traits_cpu(traits->vec_dot_type)->from_float(q, scratch.q.data(), res.n_embd);
        res.q = scratch.q.data();
    }

    return res;
}

const float * mem_value(const llama_adapter_mem_entries & entries, int64_t i, mem_scratch & scratch) {
    const ggml_tensor * value = entries.value;
    const char * row = (const char *) value->data + i*value->nb[1];
    if (value->type == GGML_TYPE_F32) {
        return (const float *) row;
    }
    scratch.value.resize(value->ne[0]);
    ggml_fp16_to_fp32_row((const ggml_fp16_t *) row, scratch.value.data(), value->ne[0]);
    return scratch.value.data();
}

int64_t mem_lookup_scan(const mem_rows & rows, int64_t n) {
    int64_t best   = 0;
    float   best_s = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        const float s = rows.score(i);
        if (s > best_s) {
            best   = i;
            best_s = s;
        }
    }
    return best;
}

// Malkov, Yashunin: Efficient and robust approximate nearest neighbor search using HNSW graphs, algorithms 2 and 5
int64_t mem_lookup_hnsw(const mem_rows & rows, const llama_adapter_mem_graph & graph, int64_t h, int64_t first, int64_t n,
                        mem_scratch & scratch) {
    const int32_t * link0 = graph.link0 + first*graph.m0;
    const int32_t * upper = graph.upper + first;

    int32_t cur   = graph.entry[h];
    float   cur_s = rows.score(cur);

    // greedy descent to level 1
    for (int32_t level = upper[cur + 1] - upper[cur]; level > 0; level--) {
        for (bool moved = true; moved; ) {
            moved = false;
            const int32_t * links = graph.link + (int64_t) (upper[cur] + level - 1)*graph.m;
            for (int32_t j = 0; j < graph.m && links[j] >= 0; j++) {
                const float s = rows.score(links[j]);
                if (s > cur_s) {
                    cur   = links[j];
                    cur_s = s;
                    moved = true;
                }
            }
        }
    }

    if ((int64_t) scratch.visited.size() < n) {
        scratch.visited.assign(n, 0);
        scratch.epoch = 0;
    }
    if (++scratch.epoch == 0) {
        std::fill(scratch.visited.begin(), scratch.visited.end(), 0);
        scratch.epoch = 1;
    }

    // best-first search on level 0
    auto & open  = scratch.open;
    auto & found = scratch.found;
    auto & next  = scratch.next;

    open .assign(1, {cur_s, cur});
    found.assign(1, {cur_s, cur});
    scratch.visited[cur] = scratch.epoch;

    mem_candidate best = {cur_s, cur};

    while (!open.empty()) {
        const mem_candidate c = open.front();
        if (c.first < found.front().first && found.size() >= MEM_HNSW_EF) {
            break;
        }
        std::pop_heap(open.begin(), open.end());
        open.pop_back();

        // all rows are asked for before the first is scored, so that they arrive while others are
        next.clear();
        const int32_t * links = link0 + (int64_t) c.second*graph.m0;
        for (int32_t j = 0; j < graph.m0 && links[j] >= 0; j++) {
            if (scratch.visited[links[j]] != scratch.epoch) {
                scratch.visited[links[j]] = scratch.epoch;
                rows.prefetch(links[j]);
                next.push_back(links[j]);
            }
        }

        for (const int32_t i : next) {
            const float s = rows.score(i);
            if (found.size() < MEM_HNSW_EF || s > found.front().first) {
                open.push_back({s, i});
                std::push_heap(open.begin(), open.end());

                found.push_back({s, i});
                std::push_heap(found.begin(), found.end(), std::greater<mem_candidate>());
                if (found.size() > MEM_HNSW_EF) {
                    std::pop_heap(found.begin(), found.end(), std::greater<mem_candidate>());
                    found.pop_back();
                }
                if (s > best.first) {
                    best = {s, i};
                }
            }
        }
    }

    return best.second;
}

// o [n_embd_head_v], lse
void mem_state(const llama_adapter_mems::op_params & p, int64_t h, const float * q, float * out, int64_t n_embd_v,
               mem_scratch & scratch) {
    scratch.acc.assign(n_embd_v, 0.0f);

    mem_acc acc;
    acc.o = scratch.acc.data();
    acc.n = n_embd_v;

    for (const auto & item : p.mems->items) {
        for (const auto & segment : item.adapter->layers[p.il].segments) {
            if (const int64_t n = segment.centroid.n(h)) {
                const auto & entries = segment.centroid;
                const mem_rows rows = mem_rows_of(entries, h, q, scratch);
                const int64_t first = entries.offset[h];
                const int64_t best  = segment.graph.link0 && n >= p.hnsw_min_entries ?
                    mem_lookup_hnsw(rows, segment.graph, h, first, n, scratch) :
                    mem_lookup_scan(rows, n);
                acc.add(((const float *) entries.lse->data)[first + best] + item.gain, mem_value(entries, first + best, scratch));
            }
            if (const int64_t n = segment.anchor.n(h)) {
                const auto & entries = segment.anchor;
                const mem_rows rows = mem_rows_of(entries, h, q, scratch);
                const int64_t first = entries.offset[h];
                for (int64_t i = 0; i < n; i++) {
                    acc.add(rows.dot(i)*p.kq_scale + rows.bias[i] + item.gain, mem_value(entries, first + i, scratch));
                }
            }
        }
    }

    // an empty memory has the state (0, -inf), the identity of the merge
    const float inv = acc.sum > 0.0f ? 1.0f/acc.sum : 0.0f;
    for (int64_t i = 0; i < n_embd_v; i++) {
        out[i] = acc.o[i]*inv;
    }
    out[n_embd_v] = acc.sum > 0.0f ? acc.max + logf(acc.sum) : -INFINITY;
}

} // namespace

void llama_adapter_mem_op_state(ggml_tensor * dst, int ith, int nth, void * userdata) {
    const auto & p = *(const llama_adapter_mems::op_params *) userdata;

    const ggml_tensor * q = dst->src[0]; // [n_embd_head_k, n_tokens, n_head]

    const int64_t n_tokens  = q->ne[1];
    const int64_t n_head    = q->ne[2];
    const int64_t n_gqa     = n_head/p.mems->items[0].adapter->model->hparams.n_head_kv(p.il);
    const int64_t n_embd_v  = dst->ne[0] - 1;

    thread_local mem_scratch scratch;

    // the heads of a token are neighbours, so that a thread keeps to few tables
    const int64_t n  = n_tokens*n_head;
    const int64_t dr = (n + nth - 1)/nth;
    for (int64_t i = dr*ith; i < std::min(n, dr*(ith + 1)); i++) {
        const int64_t h = i / n_tokens;
        const int64_t t = i % n_tokens;

        const float * q_row = (const float *) ((const char *) q->data + t*q->nb[1] + h*q->nb[2]);
        float       * row   = (float       *) ((char *) dst->data + h*dst->nb[1] + t*dst->nb[2]);

        mem_state(p, h/n_gqa, q_row, row, n_embd_v, scratch);
    }
}

//
// interface: states outside of a graph, for tests and measurements
//

int32_t llama_adapter_mem_state(
        const llama_adapter_mem * adapter,
                        int32_t   il,
                        int32_t   n_tokens,
                    const float * q,
               llama_mem_lookup   lookup,
                          float * state) {
    if (il < 0 || il >= (int32_t) adapter->layers.size() || adapter->layers[il].empty() || !adapter->layers[il].is_host) {
        return -1;
    }

    const auto & hparams = adapter->model->hparams;

    const int64_t n_head   = hparams.n_head(il);
    const int64_t n_embd_k = hparams.n_embd_head_k(il);
    const int64_t n_embd_v = hparams.n_embd_head_v(il);

    const float gain = 0.0f;
    const llama_adapter_mems mems(&adapter, &gain, 1, lookup);

    const llama_adapter_mems::op_params p = { &mems, il, adapter->kq_scale, mems.hnsw_min_entries(lookup) };

    mem_scratch scratch;
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t h = 0; h < n_head; h++) {
            mem_state(p, h/hparams.n_gqa(il), q + (t*n_head + h)*n_embd_k, state + (t*n_head + h)*(n_embd_v + 1), n_embd_v, scratch);
        }
    }

    return 0;
}
