// attention over live tokens and memories in stock ops, on any backend: the reference of GGML_OP_MEM_STATE
//
//   softmax([live logits | memory logits])*[live values | memory values]

#include "llama-adapter-mem.h"

#include <vector>

// attention of the queries of one KV head
struct mem_head_stock {
    ggml_context * ctx;
    ggml_tensor  * q;      // [n_embd_head_k, n_tokens, n_gqa]
    ggml_tensor  * logits; // [columns, n_tokens, n_gqa], live ones first
    int64_t        h;
    float          kq_scale;

    struct columns {
        int64_t       n;
        ggml_tensor * value;  // [n, n_embd_head_v] if shared by all queries, else [n, n_embd_head_v, n_tokens*n_gqa]
        bool          shared;
        ggml_tensor * delta;  // [n_embd_head_v, n_tokens, n_gqa] added to their mean value, or nullptr
    };
    std::vector<columns> extra;

    int64_t n_tokens() const { return q->ne[1]; }
    int64_t n_gqa()    const { return q->ne[2]; }
    int64_t n_q()      const { return n_tokens()*n_gqa(); }

    void add(ggml_tensor * kq, ggml_tensor * value, bool shared, ggml_tensor * delta = nullptr) {
        logits = ggml_concat(ctx, logits, kq, 0);
        extra.push_back({kq->ne[0], value, shared, delta});
    }

    ggml_tensor * rows(const llama_adapter_mem_entries & e, ggml_tensor * t) const {
        return ggml_view_2d(ctx, t, t->ne[0], e.n(h), t->nb[1], e.offset[h]*t->nb[1]);
    }

    ggml_tensor * scalars(const llama_adapter_mem_entries & e, ggml_tensor * t) const {
        return ggml_view_1d(ctx, t, e.n(h), e.offset[h]*t->nb[0]);
    }

    // rows for a matrix product; one with a quantized table would quantize the other factor as well
    ggml_tensor * matrix(const llama_adapter_mem_entries & e, ggml_tensor * t) const {
        return ggml_is_quantized(t->type) ? ggml_cast(ctx, rows(e, t), GGML_TYPE_F32) : rows(e, t);
    }

    // scale*key*q + bias + gain, [n, n_tokens, n_gqa]
    ggml_tensor * score(const llama_adapter_mem_entries & e, float scale, float gain) const {
        ggml_tensor * res = ggml_mul_mat(ctx, matrix(e, e.key), q);
        ggml_prec_set_acc(res, GGML_PREC_F32);
        if (scale != 1.0f || gain != 0.0f) {
            res = ggml_scale_bias(ctx, res, scale, gain);
        }
        return ggml_add(ctx, res, scalars(e, e.bias));
    }

    ggml_tensor * argmax(ggml_tensor * score) const {
        return ggml_argmax(ctx, ggml_reshape_2d(ctx, score, score->ne[0], n_q()));
    }

    // the scores with the indices [k, n_q], as [k, n_tokens, n_gqa]
    ggml_tensor * gather(ggml_tensor * score, ggml_tensor * index, int64_t k) const {
        ggml_tensor * res = ggml_get_rows(ctx, ggml_reshape_3d(ctx, score, 1, score->ne[0], n_q()), ggml_reshape_2d(ctx, index, k, n_q()));
        return ggml_reshape_3d(ctx, res, k, n_tokens(), n_gqa());
    }

    ggml_tensor * value_of(const llama_adapter_mem_entries & e, ggml_tensor * best) const {
        return ggml_reshape_3d(ctx, ggml_get_rows(ctx, rows(e, e.value), best), e.value->ne[0], n_tokens(), n_gqa());
    }

    ggml_tensor * lse_of(const llama_adapter_mem_entries & e, ggml_tensor * best) const {
        ggml_tensor * lse = ggml_reshape_2d(ctx, scalars(e, e.lse), 1, e.n(h));
        return ggml_reshape_3d(ctx, ggml_get_rows(ctx, lse, best), 1, n_tokens(), n_gqa());
    }

    void add_centroid(const llama_adapter_mem_entries & e, float gain) {
        ggml_tensor * best = argmax(score(e, 1.0f, 0.0f));
        add(ggml_scale_bias(ctx, lse_of(e, best), 1.0f, gain), value_of(e, best), false);
    }

    void add_tangent(const llama_adapter_mem_entries & e, float gain) {
        ggml_tensor * s    = score(e, 1.0f, gain);
        ggml_tensor * best = argmax(s);
        add(gather(s, best, 1), value_of(e, best), false);
    }

    void add_token(const llama_adapter_mem_entries & e, float gain, int64_t top_k) {
        ggml_tensor * kq    = score(e, kq_scale, gain);
        ggml_tensor * index = ggml_top_k(ctx, kq, (int) top_k);

        ggml_tensor * value = ggml_get_rows(ctx, rows(e, e.value), ggml_reshape_1d(ctx, index, top_k*n_q()));
        value = top_k == 1 ?
            ggml_reshape_3d(ctx, value, value->ne[0], n_tokens(), n_gqa()) :
            ggml_cont(ctx, ggml_transpose(ctx, ggml_reshape_3d(ctx, value, value->ne[0], top_k, n_q())));

        add(gather(kq, index, top_k), value, false);
    }

    // a residual corrects the anchors' state: its lse scales their weights, its value is added with the sum of the weights
    void add_anchor(const llama_adapter_mem_entries & e, float gain, const llama_adapter_mem_entries * residual) {
        ggml_tensor * kq    = score(e, kq_scale, gain);
        ggml_tensor * delta = nullptr;
        if (residual) {
            ggml_tensor * best = argmax(score(*residual, 1.0f, 0.0f));
            kq    = ggml_add(ctx, kq, lse_of(*residual, best));
            delta = value_of(*residual, best);
        }
        add(kq, ggml_cont(ctx, ggml_transpose(ctx, matrix(e, e.value))), true, delta);
    }

    void add_kind(ggml_mem_kind kind, const llama_adapter_mem_segment & segment, float gain, int64_t top_k) {
        const llama_adapter_mem_entries & e = segment[kind];
        const llama_adapter_mem_entries & residual = segment[GGML_MEM_RESIDUAL];
        switch (kind) {
            case GGML_MEM_CENTROID: add_centroid(e, gain); break;
            case GGML_MEM_TANGENT:  add_tangent (e, gain); break;
            case GGML_MEM_RESIDUAL: break; // with the anchors
            case GGML_MEM_TOKEN:
                if (e.n(h) > top_k) {
                    add_token(e, gain, top_k);
                } else {
                    add_anchor(e, gain, nullptr);
                }
                break;
            case GGML_MEM_ANCHOR:   add_anchor(e, gain, residual.n(h) > 0 ? &residual : nullptr); break;
            case GGML_MEM_MERGE:    GGML_ABORT("fatal error");
        }
    }

    void add_segment(const llama_adapter_mem_segment & segment, float gain, int64_t top_k) {
        for (const auto & kind : LLAMA_ADAPTER_MEM_KINDS) {
            if (segment[kind.kind].n(h) > 0) {
                add_kind(kind.kind, segment, gain, top_k);
            }
        }
    }

    // v_t [n_kv, n_embd_head_v] are the live values
    ggml_tensor * build(ggml_tensor * v_t) const {
        ggml_tensor * p = ggml_soft_max(ctx, logits);

        // contiguous, because some backends want even strides in a matrix product
        auto columns_of = [&](int64_t first, int64_t n) {
            return ggml_cont(ctx, ggml_view_3d(ctx, p, n, n_tokens(), n_gqa(), p->nb[1], p->nb[2], first*p->nb[0]));
        };

        ggml_tensor * res = ggml_mul_mat(ctx, v_t, columns_of(0, v_t->ne[0]));

        int64_t first = v_t->ne[0];
        for (const auto & e : extra) {
            ggml_tensor * p_e = columns_of(first, e.n);
            ggml_tensor * o;
            if (e.shared) {
                o = ggml_mul_mat(ctx, e.value, p_e);
            } else if (e.n == 1) {
                o = ggml_mul(ctx, e.value, p_e);
            } else {
                o = ggml_mul_mat(ctx, e.value, ggml_reshape_3d(ctx, p_e, e.n, 1, n_q()));
                o = ggml_reshape_3d(ctx, o, o->ne[0], n_tokens(), n_gqa());
            }
            res = ggml_add(ctx, res, o);
            if (e.delta) {
                res = ggml_add(ctx, res, ggml_mul(ctx, e.delta, ggml_sum_rows(ctx, p_e)));
            }
            first += e.n;
        }

        return res;
    }
};

// one KV head at a time, because heads have tables of different size
ggml_tensor * llama_adapter_mems::build_attn_stock(
        ggml_context * ctx,
         ggml_tensor * q,
         ggml_tensor * k,
         ggml_tensor * v_t,
         ggml_tensor * kq_mask,
               float   kq_scale,
                 int   il) const {
    const int64_t n_tokens  = q->ne[1];
    const int64_t n_kv      = k->ne[1];
    const int64_t n_head_kv = k->ne[2];
    const int64_t n_gqa     = q->ne[2]/n_head_kv;

    ggml_tensor * res = nullptr;

    for (int64_t h = 0; h < n_head_kv; h++) {
        ggml_tensor * q_h = ggml_view_3d(ctx, q, q->ne[0], n_tokens, n_gqa, q->nb[1], q->nb[2], h*n_gqa*q->nb[2]);
        ggml_tensor * k_h = ggml_view_2d(ctx, k, k->ne[0], n_kv, k->nb[1], h*k->nb[2]);
        ggml_tensor * v_h = ggml_view_2d(ctx, v_t, n_kv, v_t->ne[1], v_t->nb[1], h*v_t->nb[2]);

        mem_head_stock head = { ctx, q_h, build_kq(ctx, q_h, k_h, kq_mask, kq_scale), h, kq_scale, {} };

        for (const auto & item : items) {
            for (const auto & segment : item.adapter->layers[il].segments) {
                head.add_segment(segment, item.gain, item.adapter->token_top_k);
            }
        }

        ggml_tensor * kqv = head.build(v_h);

        res = res ? ggml_concat(ctx, res, kqv, 2) : kqv;
    }

    return res;
}
