// how a memory reaches attention: its state (o, lse) merges with flash attention, or joins the softmax as one more column

#include "llama-adapter-mem.h"

#include "llama-impl.h"

#include <stdexcept>

// tables below this size are scanned faster than they are searched
static constexpr int32_t MEM_SEARCH_MIN_ENTRIES = 2048;

// number of lists searched in a table of n entries, for a recall@1 of 0.98 (bench/speed/search.py)
static int32_t mem_n_probe(int64_t n) { return n <= 16384 ? 12 : 16; }

// the query without the rotation that a quantized KV cache gives it
static ggml_tensor * mem_unrotate(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k_rot) {
    return k_rot ? llama_mul_mat_hadamard(ctx, q, k_rot) : q;
}

ggml_tensor * llama_adapter_mems::build_state(
        ggml_context * ctx,
         ggml_tensor * q,
               float   kq_scale,
         ggml_tensor * k_rot,
         ggml_tensor * v_rot,
                 int   il) {
    reach_layer(kq_scale, il);

    if (!has_op(il) || q->ne[3] != 1) {
        return nullptr;
    }

    return build_state_rotated(ctx, q, kq_scale, k_rot, v_rot, il);
}

ggml_tensor * llama_adapter_mems::build_state_rotated(
        ggml_context * ctx,
         ggml_tensor * q,
               float   kq_scale,
         ggml_tensor * k_rot,
         ggml_tensor * v_rot,
                 int   il) const {
    ggml_tensor * state = build_state_op(ctx, mem_unrotate(ctx, q, k_rot), kq_scale, il);

    if (v_rot) {
        const int64_t n_embd_v = state->ne[0] - 1;

        ggml_tensor * o   = ggml_view_3d(ctx, state, n_embd_v, state->ne[1], state->ne[2], state->nb[1], state->nb[2], 0);
        ggml_tensor * lse = ggml_view_3d(ctx, state, 1,        state->ne[1], state->ne[2], state->nb[1], state->nb[2], n_embd_v*state->nb[0]);

        state = ggml_concat(ctx, llama_mul_mat_hadamard(ctx, o, v_rot), lse, 0);
    }

    return state;
}

ggml_tensor * llama_adapter_mems::build_attn(
        ggml_context * ctx,
         ggml_tensor * q,
         ggml_tensor * k,
         ggml_tensor * v_t,
         ggml_tensor * kq_mask,
               float   kq_scale,
         ggml_tensor * k_rot,
         ggml_tensor * v_rot,
                 int   il) {
    if (k->ne[3] != 1) {
        throw std::runtime_error("unsupported: several KV streams");
    }

    reach_layer(kq_scale, il);

    const bool op = has_op(il);

    // flash attention, which a quantized V needs, merges with the state of the op instead
    if (ggml_is_quantized(v_t->type) || v_rot || (!op && (ggml_is_quantized(k->type) || k_rot))) {
        throw std::runtime_error(format("unsupported: a quantized KV cache (%s, %s) where a memory is looked up by stock ops; use f16, bf16 or f32",
            ggml_type_name(k->type), ggml_type_name(v_t->type)));
    }

    if (kq_mask->type != GGML_TYPE_F32) {
        kq_mask = ggml_cast(ctx, kq_mask, GGML_TYPE_F32);
    }

    return op ? build_attn_op   (ctx, q, k, v_t, kq_mask, kq_scale, k_rot, il)
              : build_attn_stock(ctx, q, k, v_t, kq_mask, kq_scale, il);
}

// a table for the op, with the search that the lookup takes
static ggml_mem_table mem_table(const llama_adapter_mem_entries & e, ggml_mem_kind kind, int64_t top_k, llama_mem_lookup lookup, bool is_host) {
    ggml_mem_table res = { kind, e.key, e.bias, e.value, e.lse, e.head, (int32_t) top_k, 0, (int32_t) e.n_max(), };

    const bool is_auto  = lookup == LLAMA_MEM_LOOKUP_AUTO && e.n_max() >= MEM_SEARCH_MIN_ENTRIES;
    const bool is_token = kind == GGML_MEM_TOKEN; // lists of keys find the best of them less often than a graph

    if (e.link0 && is_host && (lookup == LLAMA_MEM_LOOKUP_HNSW || (is_auto && (is_token || !e.list)))) {
        res.link0 = e.link0;
        res.link  = e.link;
        res.upper = e.upper;
    } else if (e.list && (is_host || !is_token) && (is_auto || lookup == LLAMA_MEM_LOOKUP_LISTS)) {
        res.list_key  = e.list_key;
        res.list_bias = e.list_bias;
        res.list      = e.list;
        res.n_probe   = mem_n_probe(e.n_max());
    }
    res.min_entries = is_auto ? MEM_SEARCH_MIN_ENTRIES : 0;

    return res;
}

ggml_tensor * llama_adapter_mems::build_state_op(ggml_context * ctx, ggml_tensor * q, float kq_scale, int il) const {
    const bool is_host = items[0].adapter->layers[il].is_host;

    ggml_tensor * res = nullptr;

    for (const auto & item : items) {
        for (const auto & segment : item.adapter->layers[il].segments) {
            auto add = [&](ggml_tensor * state, ggml_mem_kind kind, float gain) {
                const ggml_mem_table table = mem_table(segment[kind], kind, item.adapter->token_top_k, lookup, is_host);
                return ggml_mem_state(ctx, q, state, &table, kq_scale, gain);
            };
            for (const auto & info : LLAMA_ADAPTER_MEM_KINDS) {
                const ggml_mem_kind kind = info.kind;
                if (segment[kind].n_all() == 0 || kind == GGML_MEM_RESIDUAL) {
                    continue;
                }
                if (kind == GGML_MEM_ANCHOR && segment[GGML_MEM_RESIDUAL].n_all() > 0) {
                    // residuals correct the state of the anchors alone, before it is merged with others
                    ggml_tensor * state = add(nullptr, kind, 0.0f);
                    state = add(state, GGML_MEM_RESIDUAL, item.gain);
                    res = res ? ggml_mem_state_merge(ctx, res, state) : state;
                } else {
                    res = add(res, kind, item.gain);
                }
            }
        }
    }

    return res;
}

ggml_tensor * llama_adapter_mems::build_kq(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale) {
    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    kq = ggml_scale(ctx, kq, kq_scale);
    return ggml_add(ctx, kq, kq_mask);
}

// the state of all memories joins the softmax as one more column
ggml_tensor * llama_adapter_mems::build_attn_op(
        ggml_context * ctx,
         ggml_tensor * q,
         ggml_tensor * k,
         ggml_tensor * v_t,
         ggml_tensor * kq_mask,
               float   kq_scale,
         ggml_tensor * k_rot,
                 int   il) const {
    const int64_t n_tokens = q->ne[1];
    const int64_t n_head   = q->ne[2];
    const int64_t n_kv     = k->ne[1];
    const int64_t n_embd_v = v_t->ne[1];

    ggml_tensor * state = build_state_op(ctx, mem_unrotate(ctx, q, k_rot), kq_scale, il);

    ggml_tensor * o   = ggml_view_3d(ctx, state, n_embd_v, n_tokens, n_head, state->nb[2], state->nb[1], 0);
    ggml_tensor * lse = ggml_view_3d(ctx, state, 1,        n_tokens, n_head, state->nb[2], state->nb[1], n_embd_v*state->nb[0]);

    ggml_tensor * kq = build_kq(ctx, q, k, kq_mask, kq_scale);
    ggml_tensor * p  = ggml_soft_max(ctx, ggml_concat(ctx, kq, lse, 0));

    ggml_tensor * p_live = ggml_view_3d(ctx, p, n_kv, n_tokens, n_head, p->nb[1], p->nb[2], 0);
    ggml_tensor * p_mem  = ggml_view_3d(ctx, p, 1,    n_tokens, n_head, p->nb[1], p->nb[2], n_kv*p->nb[0]);

    if (!items[0].adapter->layers[il].is_host) {
        p_live = ggml_cont(ctx, p_live); // matrix products on CUDA want rows that begin at even numbers
    }

    return ggml_add(ctx, ggml_mul_mat(ctx, v_t, p_live), ggml_mul(ctx, o, p_mem));
}
