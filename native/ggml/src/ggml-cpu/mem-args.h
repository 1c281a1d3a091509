// The arguments of GGML_OP_MEM_STATE
#pragma once

#include "ggml.h"
#include "ggml-impl.h"

struct mem_args {
    ggml_mem_kind kind;

    const ggml_tensor * q;      // [n_embd_k, n_tokens, n_head]
    const ggml_tensor * state;  // what to merge with, or nullptr
    const ggml_tensor * key;    // [n_embd_k, n]
    const ggml_tensor * bias;   // [n]
    const ggml_tensor * value;  // [n_embd_v, n]
    const ggml_tensor * lse;    // [n], centroids and residuals only

    const int32_t * offset;     // [n_head_kv + 1]
    const int32_t * entry;      // [n_head_kv], local entry where the walk of a head begins

    const int32_t * link0;      // HNSW graph as in ggml_mem_table, or nullptr
    const int32_t * link;
    const int32_t * upper;
    int64_t m0, m;              // links of an entry on level 0, and on a level above

    const ggml_tensor * list_key;    // [n_embd_k, n_list], or nullptr
    const float       * list_bias;   // [n_list]
    const int32_t     * list;        // [n_list + 1], first entry of each list
    const int32_t     * list_offset; // [n_head_kv + 1], first list of each head
    int64_t n_probe;                 // lists that are searched

    int64_t n_embd_k, n_embd_v, n_tokens, n_head, n_head_kv, n_gqa;

    float   scale;              // of the scores
    float   gain;
    int64_t top_k;              // entries in the state of a query
    int64_t min_entries;        // heads with fewer entries are scanned

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

        n_probe = ggml_get_op_params_i32(dst, 5);

        link0 = link = upper = nullptr;
        list_key  = nullptr;
        list_bias = nullptr;
        list = list_offset = nullptr;
        m0 = m = 0;
        if (n_probe > 0) {
            list_key    = dst->src[7];
            list_bias   = (const float *) dst->src[8]->data;
            list        = (const int32_t *) dst->src[9]->data;
            list_offset = (const int32_t *) ((const char *) dst->src[6]->data + 2*dst->src[6]->nb[1]);
        } else if (dst->src[7]) {
            link0 = (const int32_t *) dst->src[7]->data;
            link  = (const int32_t *) dst->src[8]->data;
            upper = (const int32_t *) dst->src[9]->data;
            m0    = dst->src[7]->ne[0];
            m     = dst->src[8]->ne[0];
        }

        kind        = (ggml_mem_kind) ggml_get_op_params_i32(dst, 0);
        scale       = kind == GGML_MEM_TOKEN || kind == GGML_MEM_ANCHOR ? ggml_get_op_params_f32(dst, 1) : 1.0f;
        gain        = ggml_get_op_params_f32(dst, 2);
        top_k       = kind == GGML_MEM_TOKEN ? ggml_get_op_params_i32(dst, 3) : 1;
        min_entries = ggml_get_op_params_i32(dst, 4);
    }

    int64_t n(int64_t h) const { return offset[h + 1] - offset[h]; }

    // whether a head is searched; otherwise it is scanned
    bool use_search(int64_t h) const { return (link0 || list) && n(h) > top_k && n(h) >= min_entries; }

    // the queries of a KV head are numbered head by head
    const float * query(int64_t h, int64_t j) const {
        return (const float *) ((const char *) q->data + (h*n_gqa + j/n_tokens)*q->nb[2] + (j%n_tokens)*q->nb[1]);
    }

    float * result(ggml_tensor * dst, int64_t h, int64_t j) const {
        return (float *) ((char *) dst->data + (h*n_gqa + j/n_tokens)*dst->nb[1] + (j%n_tokens)*dst->nb[2]);
    }
};
