// the attention state of a memory, on the CPU: exact scan or HNSW over what is looked up, attention over what is attended

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
constexpr size_t MEM_HNSW_EF = 16;

// for tokens: keys are harder to find than centroids, because queries are not distributed like them
constexpr size_t MEM_HNSW_EF_TOKEN = 64;

// rows of a table, scored against one query
struct mem_rows {
    const char  * key;
    const float * bias;
    size_t        row_size;
    int64_t       n_embd;
    float         scale; // 1 for a lookup, kq_scale for the logits of attention
    ggml_vec_dot_t vec_dot;
    const void  * q;      // converted to the type that vec_dot wants
    const void  * q_rest; // what the conversion to Q8_0 left of q, converted again

    float score(int64_t i) const {
        float s;
        vec_dot((int) n_embd, &s, 0, key + i*row_size, 0, q, 0, 1);
        if (q_rest) {
            float s_rest;
            vec_dot((int) n_embd, &s_rest, 0, key + i*row_size, 0, q_rest, 0, 1);
            s += s_rest;
        }
        return s*scale + bias[i];
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
    std::vector<mem_candidate> found; // the best so far, a min-heap
    std::vector<int32_t>       next;  // HNSW: neighbours not visited yet

    std::vector<uint8_t>  q;       // one query row in the type of the dot product
    std::vector<uint8_t>  q_rest;
    std::vector<float>    rest;
    std::vector<float>    value;   // one value row as F32
    std::vector<float>    acc;     // [n_embd_head_v]
    std::vector<float>    acc_anchor;
    std::vector<uint32_t> visited; // per entry, equal to epoch when visited in this search
    uint32_t              epoch = 0;
};

// the state under construction: sum_i exp(s_i - max) v_i and sum_i exp(s_i - max)
struct mem_acc {
    float   max = -INFINITY;
    float   sum = 0.0f;
    float * o;
    int64_t n;

    mem_acc(std::vector<float> & buf, int64_t n) : n(n) {
        buf.assign(n, 0.0f);
        o = buf.data();
    }

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

    // normalizes o; an empty state is (0, -inf), the identity of the merge
    float finish() {
        const float inv = sum > 0.0f ? 1.0f/sum : 0.0f;
        for (int64_t i = 0; i < n; i++) {
            o[i] *= inv;
        }
        return sum > 0.0f ? max + logf(sum) : -INFINITY;
    }
};

mem_rows mem_rows_of(const llama_adapter_mem_entries & entries, int64_t h, const float * q, float scale, mem_scratch & scratch) {
    const ggml_tensor * key = entries.key;

    const auto * traits = ggml_get_type_traits_cpu(key->type);

    mem_rows res;
    res.key      = (const char *) key->data + entries.offset[h]*key->nb[1];
    res.bias     = (const float *) entries.bias->data + entries.offset[h];
    res.row_size = key->nb[1];
    res.n_embd   = key->ne[0];
    res.scale    = scale;
    res.vec_dot  = traits->vec_dot;
    res.q        = q;
    res.q_rest   = nullptr;

    const ggml_type type = traits->vec_dot_type;

    auto convert = [&](const float * x, std::vector<uint8_t> & buf) {
        buf.resize(ggml_row_size(type, res.n_embd));
        ggml_get_type_traits_cpu(type)->from_float(x, buf.data(), res.n_embd);
        return buf.data();
    };

    if (type != GGML_TYPE_F32) {
        res.q = convert(q, scratch.q);
    }
    // one Q8_0 row would round q too coarsely, the sum of two keeps more of it than F16 does
    if (type == GGML_TYPE_Q8_0) {
        scratch.rest.resize(res.n_embd);
        ggml_get_type_traits(type)->to_float(scratch.q.data(), scratch.rest.data(), res.n_embd);
        for (int64_t i = 0; i < res.n_embd; i++) {
            scratch.rest[i] = q[i] - scratch.rest[i];
        }
        res.q_rest = convert(scratch.rest.data(), scratch.q_rest);
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
    ggml_get_type_traits(value->type)->to_float(row, scratch.value.data(), value->ne[0]);
    return scratch.value.data();
}

// the k best entries, unordered, to scratch.found
void mem_lookup_scan(const mem_rows & rows, int64_t n, size_t k, mem_scratch & scratch) {
    auto & found = scratch.found;

    found.clear();
    for (int64_t i = 0; i < n; i++) {
        const float s = rows.score(i);
        if (found.size() < k || s > found.front().first) {
            if (found.size() == k) {
                std::pop_heap(found.begin(), found.end(), std::greater<mem_candidate>());
                found.pop_back();
            }
            found.push_back({s, (int32_t) i});
            std::push_heap(found.begin(), found.end(), std::greater<mem_candidate>());
        }
    }
}

// Malkov, Yashunin: Efficient and robust approximate nearest neighbor search using HNSW graphs, algorithms 2 and 5
// about the ef best entries, unordered, to scratch.found
void mem_lookup_hnsw(const mem_rows & rows, const llama_adapter_mem_graph & graph, int64_t h, int64_t first, int64_t n, size_t ef,
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

    while (!open.empty()) {
        const mem_candidate c = open.front();
        if (c.first < found.front().first && found.size() >= ef) {
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
            if (found.size() < ef || s > found.front().first) {
                open.push_back({s, i});
                std::push_heap(open.begin(), open.end());

                found.push_back({s, i});
                std::push_heap(found.begin(), found.end(), std::greater<mem_candidate>());
                if (found.size() > ef) {
                    std::pop_heap(found.begin(), found.end(), std::greater<mem_candidate>());
                    found.pop_back();
                }
            }
        }
    }
}

bool mem_use_hnsw(const llama_adapter_mems::op_params & p, const llama_adapter_mem_entries & entries, int64_t h) {
    return entries.graph.link0 && entries.n(h) >= p.hnsw_min_entries;
}

// the entry with the largest key*q + bias
mem_candidate mem_best(const llama_adapter_mems::op_params & p, const llama_adapter_mem_entries & entries, int64_t h, const float * q,
                       mem_scratch & scratch) {
    const mem_rows rows = mem_rows_of(entries, h, q, 1.0f, scratch);
    const int32_t first = entries.offset[h];

    if (mem_use_hnsw(p, entries, h)) {
        mem_lookup_hnsw(rows, entries.graph, h, first, entries.n(h), MEM_HNSW_EF, scratch);
    } else {
        mem_lookup_scan(rows, entries.n(h), 1, scratch);
    }

    const mem_candidate best = *std::max_element(scratch.found.begin(), scratch.found.end());
    return {best.first, first + best.second};
}

// attention over the top_k tokens; the anchors stand for all others
void mem_add_tokens(const llama_adapter_mems::op_params & p, const llama_adapter_mem_entries & entries, int64_t h, const float * q,
                    size_t top_k, float gain, mem_acc & acc, mem_scratch & scratch) {
    const mem_rows rows = mem_rows_of(entries, h, q, p.kq_scale, scratch);
    const int64_t first = entries.offset[h];

    auto & found = scratch.found;

    if (entries.n(h) > (int64_t) top_k && mem_use_hnsw(p, entries, h)) {
        mem_lookup_hnsw(rows, entries.graph, h, first, entries.n(h), std::max(MEM_HNSW_EF_TOKEN, 2*top_k), scratch);
        while (found.size() > top_k) {
            std::pop_heap(found.begin(), found.end(), std::greater<mem_candidate>());
            found.pop_back();
        }
    } else {
        mem_lookup_scan(rows, entries.n(h), top_k, scratch);
    }

    for (const auto & [s, i] : found) {
        acc.add(s + gain, mem_value(entries, first + i, scratch));
    }
}

void mem_add_anchors(const llama_adapter_mems::op_params & p, const llama_adapter_mem_entries & entries, int64_t h, const float * q,
                     float gain, mem_acc & acc, mem_scratch & scratch) {
    const mem_rows rows = mem_rows_of(entries, h, q, p.kq_scale, scratch);
    const int64_t first = entries.offset[h];

    for (int64_t i = 0; i < entries.n(h); i++) {
        acc.add(rows.score(i) + gain, mem_value(entries, first + i, scratch));
    }
}

void mem_add_segment(const llama_adapter_mems::op_params & p, const llama_adapter_mems::item & item, const llama_adapter_mem_segment & segment,
                     int64_t h, const float * q, mem_acc & acc, mem_scratch & scratch) {
    auto lse = [](const llama_adapter_mem_entries & entries, int64_t i) { return ((const float *) entries.lse->data)[i]; };

    if (segment.centroid.n(h) > 0) {
        const auto [s, i] = mem_best(p, segment.centroid, h, q, scratch);
        acc.add(lse(segment.centroid, i) + item.gain, mem_value(segment.centroid, i, scratch));
    }

    if (segment.tangent.n(h) > 0) {
        const auto [s, i] = mem_best(p, segment.tangent, h, q, scratch);
        acc.add(s + item.gain, mem_value(segment.tangent, i, scratch));
    }

    if (segment.token.n(h) > 0) {
        mem_add_tokens(p, segment.token, h, q, item.adapter->token_top_k, item.gain, acc, scratch);
    }

    if (segment.residual.n(h) > 0) {
        // corrects the state of the anchors, which is therefore needed by itself
        mem_acc acc_anchor(scratch.acc_anchor, acc.n);
        mem_add_anchors(p, segment.anchor, h, q, 0.0f, acc_anchor, scratch);
        const float lse_anchor = acc_anchor.finish();

        const auto [s, i] = mem_best(p, segment.residual, h, q, scratch);
        const float * delta = mem_value(segment.residual, i, scratch);
        for (int64_t j = 0; j < acc.n; j++) {
            acc_anchor.o[j] += delta[j];
        }
        acc.add(lse_anchor + lse(segment.residual, i) + item.gain, acc_anchor.o);
    } else if (segment.anchor.n(h) > 0) {
        mem_add_anchors(p, segment.anchor, h, q, item.gain, acc, scratch);
    }
}

// o [n_embd_head_v], lse
void mem_state(const llama_adapter_mems::op_params & p, int64_t h, const float * q, float * out, int64_t n_embd_v, mem_scratch & scratch) {
    mem_acc acc(scratch.acc, n_embd_v);

    for (const auto & item : p.mems->items) {
        for (const auto & segment : item.adapter->layers[p.il].segments) {
            mem_add_segment(p, item, segment, h, q, acc, scratch);
        }
    }

    out[n_embd_v] = acc.finish();
    std::copy(acc.o, acc.o + n_embd_v, out);
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
