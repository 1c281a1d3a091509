// how a memory reaches attention: the graph of softmax([live logits | memory logits])*[live values | memory values]

#include "llama-adapter-mem.h"

#include "llama-adapter.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

static constexpr float    MEM_MAX_GAIN  = 1e4f;
static constexpr uint64_t MEM_MAX_NODES = 1 << 20;

// tables below this size are scanned faster than they are searched
static constexpr int32_t MEM_SEARCH_MIN_ENTRIES = 2048;

// number of lists of a table of n entries that are searched, for a recall@1 of 0.98 (bench/lookup.py)
static int32_t mem_n_probe(int64_t n) { return n <= 16384 ? 12 : 16; }

llama_adapter_mems::llama_adapter_mems(const llama_adapter_mem * const * adapters, const float * gains, size_t n_adapters, llama_mem_lookup lookup)
    : lookup(lookup) {
    size_t n_layer = 0;
    for (size_t i = 0; i < n_adapters; i++) {
        if (!adapters[i] || !(gains[i] <= MEM_MAX_GAIN)) {
            throw std::runtime_error(format("invalid: a gain is a number up to %g or -inf, not %g", MEM_MAX_GAIN, gains[i]));
        }
    }
    for (size_t i = 0; i < n_adapters; i++) {
        items.push_back({adapters[i], gains[i]});
        adapters[i]->n_attached++;
        n_layer = std::max(n_layer, adapters[i]->layers.size());
    }
    layers_reached.resize(n_layer);
}

llama_adapter_mems::~llama_adapter_mems() {
    for (const auto & item : items) {
        item.adapter->n_attached--;
    }
}

bool llama_adapter_mems::has_layer(int il) const {
    for (const auto & item : items) {
        if (il < (int) item.adapter->layers.size() && !item.adapter->layers[il].empty()) {
            return true;
        }
    }
    return false;
}

bool llama_adapter_mems::same(llama_adapter_mem * const * adapters, const float * gains, size_t n_adapters, llama_mem_lookup lookup) const {
    if (n_adapters != items.size() || lookup != this->lookup) {
        return false;
    }
    for (size_t i = 0; i < n_adapters; i++) {
        if (items[i].adapter != adapters[i] || items[i].gain != gains[i]) {
            return false;
        }
    }
    return true;
}

void llama_adapter_mems::check(const llama_model & model, const llama_cparams & cparams, const llama_adapter_loras & loras, const llama_adapter_cvec & cvec) const {
    if (items.empty()) {
        return;
    }

    for (const auto & item : items) {
        if (item.adapter->model != &model) {
            throw std::runtime_error("wrong_model: the memory was loaded for another model; load it for the model of this context");
        }
    }
    if (get_n_nodes() > MEM_MAX_NODES) {
        throw std::runtime_error(format("unsupported: the memories have too many segments (%llu graph nodes)",
            (unsigned long long) get_n_nodes()));
    }

    // what a memory cannot know of: its keys and values were computed without it
    if (!loras.empty()) {
        throw std::runtime_error("unsupported: a LoRA adapter; merge it into the model and build the memory from that model");
    }
    for (uint32_t il = 0; il < model.hparams.n_layer(); il++) {
        if (cvec.tensor_for(il)) {
            throw std::runtime_error("unsupported: a control vector; clear it before a memory is attached");
        }
        if (model.hparams.n_rot(il) != model.hparams.n_embd_head_k(il)) {
            throw std::runtime_error(format("unsupported: RoPE on %u of the %u dimensions of a head", model.hparams.n_rot(il), model.hparams.n_embd_head_k(il)));
        }
        if (model.layers[il].rope_long || model.layers[il].rope_short) {
            throw std::runtime_error("unsupported: RoPE factors that depend on the length of the context");
        }
    }

    auto differs = [](float a, float b) { return std::fabs(a - b) > 1e-6f*std::fabs(b); };

    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        throw std::runtime_error("unsupported: tensors that are split over devices; load the model with another split mode");
    }
    if (cparams.embeddings) {
        throw std::runtime_error("unsupported: a context for embeddings cannot use a memory; create it with embeddings off");
    }
    if (!cparams.causal_attn) {
        throw std::runtime_error("unsupported: a memory needs causal attention");
    }
    if (cparams.n_seq_max > 1 && !cparams.kv_unified) {
        throw std::runtime_error("unsupported: several sequences with separate KV streams; create the context with kv_unified");
    }
    for (const auto & item : items) {
        const auto & mem = *item.adapter;
        if (differs(cparams.rope_freq_base, mem.rope_freq_base) || differs(cparams.rope_freq_scale, mem.rope_freq_scale)) {
            throw std::runtime_error(format("unsupported: the context has RoPE base %g and scale %g, the memory was built with %g and %g",
                cparams.rope_freq_base, cparams.rope_freq_scale, mem.rope_freq_base, mem.rope_freq_scale));
        }
        if (cparams.yarn_ext_factor != 0.0f || differs(cparams.yarn_attn_factor, 1.0f)) {
            throw std::runtime_error("unsupported: YaRN RoPE scaling; leave yarn_ext_factor and yarn_attn_factor at their defaults");
        }
    }
}

void llama_adapter_mems::check_layers_reached() const {
    for (int il = 0; il < (int) layers_reached.size(); il++) {
        if (has_layer(il) && !layers_reached[il]) {
            throw std::runtime_error(format("unsupported: the attention of layer %d of architecture '%s' cannot take a memory",
                il, items[0].adapter->model->arch_name().c_str()));
        }
    }
}

bool llama_adapter_mems::has_op(int il) const {
    return lookup != LLAMA_MEM_LOOKUP_STOCK &&
        std::all_of(items.begin(), items.end(), [&](const item & item) { return item.adapter->layers[il].has_op; });
}

uint64_t llama_adapter_mems::get_n_nodes() const {
    uint64_t res = 0;
    for (int il = 0; il < (int) layers_reached.size(); il++) {
        if (!has_layer(il)) {
            continue;
        }
        uint64_t n_tables  = 0;
        uint64_t n_tensors = 0; // leafs of the graph
        for (const auto & item : items) {
            for (const auto & segment : item.adapter->layers[il].segments) {
                for (const auto * entries : { &segment.centroid, &segment.tangent, &segment.residual, &segment.token, &segment.anchor }) {
                    if (entries->n_all() > 0) {
                        n_tables  += 1;
                        n_tensors += 4 + (entries->lse ? 1 : 0) + (entries->link0 || entries->list ? 3 : 0);
                    }
                }
            }
        }
        // the op: one or two nodes for each table, and up to 18 for rotations and for attention without flash attention
        // stock ops: per KV head about 12, and up to 24 for each table
        res += n_tensors + (has_op(il) ? 20 + 2*n_tables :
            items[0].adapter->model->hparams.n_head_kv(il)*(16 + 32*n_tables));
    }
    return res;
}

bool llama_adapter_mems::use_op(float kq_scale, int il) {
    bool has_lookup = true;
    for (const auto & item : items) {
        const auto & mem = *item.adapter;
        if (std::fabs(mem.kq_scale - kq_scale) > 1e-5f*std::fabs(kq_scale)) {
            throw std::runtime_error(format("unsupported: layer %d scales attention by %g, the memory was built with %g", il, kq_scale, mem.kq_scale));
        }
        has_lookup = has_lookup && mem.layers[il].has_lookup(lookup);
    }
    if (!has_lookup) {
        throw std::runtime_error(format("unsupported: layer %d is on a device that does not have this lookup", il));
    }

    layers_reached[il] = true;

    return has_op(il);
}

// undoes the rotation of a quantized KV cache
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
    if (!use_op(kq_scale, il) || q->ne[3] != 1) {
        return nullptr;
    }

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

    const bool op = use_op(kq_scale, il);

    // with a quantized V there is flash attention, which merges with the state of the op
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

ggml_tensor * llama_adapter_mems::build_state_op(ggml_context * ctx, ggml_tensor * q, float kq_scale, int il) const {
    const bool is_host = items[0].adapter->layers[il].is_host;

    auto add = [&](ggml_tensor * state, ggml_mem_kind kind, const llama_adapter_mem_entries & e, float gain, int64_t top_k = 0) {
        if (e.n_all() == 0) {
            return state;
        }
        ggml_mem_table table = { kind, e.key, e.bias, e.value, e.lse, e.head, (int32_t) top_k, 0, (int32_t) e.n_max(), };

        const bool is_auto  = lookup == LLAMA_MEM_LOOKUP_AUTO && e.n_max() >= MEM_SEARCH_MIN_ENTRIES;
        const bool is_token = kind == GGML_MEM_TOKEN; // lists of keys find the best of them less often than a graph

        if (e.link0 && is_host && (lookup == LLAMA_MEM_LOOKUP_HNSW || (is_auto && (is_token || !e.list)))) {
            table.link0 = e.link0;
            table.link  = e.link;
            table.upper = e.upper;
        } else if (e.list && (is_host || !is_token) && (is_auto || lookup == LLAMA_MEM_LOOKUP_LISTS)) {
            table.list_key  = e.list_key;
            table.list_bias = e.list_bias;
            table.list      = e.list;
            table.n_probe   = mem_n_probe(e.n_max());
        }
        table.min_entries = is_auto ? MEM_SEARCH_MIN_ENTRIES : 0;

        return ggml_mem_state(ctx, q, state, &table, kq_scale, gain);
    };

    ggml_tensor * res = nullptr;

    for (const auto & item : items) {
        for (const auto & segment : item.adapter->layers[il].segments) {
            res = add(res, GGML_MEM_CENTROID, segment.centroid, item.gain);
            res = add(res, GGML_MEM_TANGENT,  segment.tangent,  item.gain);
            res = add(res, GGML_MEM_TOKEN,    segment.token,    item.gain, item.adapter->token_top_k);

            if (segment.residual.n_all() > 0) {
                // corrects the state of the anchors, which is therefore needed by itself
                ggml_tensor * own = add(nullptr, GGML_MEM_ANCHOR, segment.anchor, 0.0f);
                own = add(own, GGML_MEM_RESIDUAL, segment.residual, item.gain);
                res = res ? ggml_mem_state_merge(ctx, res, own) : own;
            } else {
                res = add(res, GGML_MEM_ANCHOR, segment.anchor, item.gain);
            }
        }
    }

    return res;
}

// live logits [n_kv, n_tokens, n_head of q], scaled and masked
static ggml_tensor * mem_build_kq(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale) {
    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    kq = ggml_scale(ctx, kq, kq_scale);
    return ggml_add(ctx, kq, kq_mask);
}

// attention of the queries of one KV head, in stock ops: softmax([live logits | memory logits])*[live values | memory values]
struct mem_head_stock {
    ggml_context * ctx;
    ggml_tensor  * q;      // [n_embd_head_k, n_tokens, n_gqa]
    ggml_tensor  * logits; // [columns, n_tokens, n_gqa], live ones first
    int64_t        h;
    float          kq_scale;

    struct columns {
        int64_t       n;
        ggml_tensor * value;  // shared by all queries [n, n_embd_head_v], or for each [n, n_embd_head_v, n_tokens*n_gqa]
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

    // a correction of the anchors' state: delta lse scales their weights, delta o comes with the sum of them
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

    void add_segment(const llama_adapter_mem_segment & segment, float gain, int64_t top_k) {
        if (segment.centroid.n(h) > 0) {
            add_centroid(segment.centroid, gain);
        }
        if (segment.tangent.n(h) > 0) {
            add_tangent(segment.tangent, gain);
        }
        if (segment.token.n(h) > top_k) {
            add_token(segment.token, gain, top_k);
        } else if (segment.token.n(h) > 0) {
            add_anchor(segment.token, gain, nullptr);
        }
        if (segment.anchor.n(h) > 0) {
            add_anchor(segment.anchor, gain, segment.residual.n(h) > 0 ? &segment.residual : nullptr);
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

// the reference: one KV head at a time because heads have tables of different size
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

        mem_head_stock head = { ctx, q_h, mem_build_kq(ctx, q_h, k_h, kq_mask, kq_scale), h, kq_scale, {} };

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

    ggml_tensor * kq = mem_build_kq(ctx, q, k, kq_mask, kq_scale);
    ggml_tensor * p  = ggml_soft_max(ctx, ggml_concat(ctx, kq, lse, 0));

    ggml_tensor * p_live = ggml_view_3d(ctx, p, n_kv, n_tokens, n_head, p->nb[1], p->nb[2], 0);
    ggml_tensor * p_mem  = ggml_view_3d(ctx, p, 1,    n_tokens, n_head, p->nb[1], p->nb[2], n_kv*p->nb[0]);

    if (!items[0].adapter->layers[il].is_host) {
        p_live = ggml_cont(ctx, p_live); // matrix products on CUDA want rows that begin at even numbers
    }

    return ggml_add(ctx, ggml_mul_mat(ctx, v_t, p_live), ggml_mul(ctx, o, p_mem));
}
