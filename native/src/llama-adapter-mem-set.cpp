// the memories that are attached to a context: whether they can be, and what they add to its graphs

#include "llama-adapter-mem.h"

#include "llama-adapter.h"
#include "llama-cparams.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <stdexcept>

static constexpr float    MEM_MAX_GAIN  = 1e4f;
static constexpr uint64_t MEM_MAX_NODES = 1 << 20;

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
        llama_adapter_mem_acquire(adapters[i]);
        n_layer = std::max(n_layer, adapters[i]->layers.size());
    }
    layers_reached.resize(n_layer);
}

llama_adapter_mems::~llama_adapter_mems() {
    for (const auto & item : items) {
        llama_adapter_mem_release(item.adapter);
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

// what a memory cannot know of, as its keys and values were computed without it
static void mem_check_model(const llama_model & model, const llama_adapter_loras & loras, const llama_adapter_cvec & cvec) {
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        throw std::runtime_error("unsupported: tensors that are split over devices; load the model with another split mode");
    }
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
}

static void mem_check_context(const llama_cparams & cparams, const llama_adapter_mem & mem) {
    auto differs = [](float a, float b) { return std::fabs(a - b) > 1e-6f*std::fabs(b); };

    if (cparams.embeddings) {
        throw std::runtime_error("unsupported: a context for embeddings cannot use a memory; create it with embeddings off");
    }
    if (!cparams.causal_attn) {
        throw std::runtime_error("unsupported: a memory needs causal attention");
    }
    if (cparams.n_seq_max > 1 && !cparams.kv_unified) {
        throw std::runtime_error("unsupported: several sequences with separate KV streams; create the context with kv_unified");
    }
    if (differs(cparams.rope_freq_base, mem.rope_freq_base) || differs(cparams.rope_freq_scale, mem.rope_freq_scale)) {
        throw std::runtime_error(format("unsupported: the context has RoPE base %g and scale %g, the memory was built with %g and %g",
            cparams.rope_freq_base, cparams.rope_freq_scale, mem.rope_freq_base, mem.rope_freq_scale));
    }
    if (cparams.yarn_ext_factor != 0.0f || differs(cparams.yarn_attn_factor, 1.0f)) {
        throw std::runtime_error("unsupported: YaRN RoPE scaling; leave yarn_ext_factor and yarn_attn_factor at their defaults");
    }
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
    mem_check_model(model, loras, cvec);
    for (const auto & item : items) {
        mem_check_context(cparams, *item.adapter);
    }
    get_n_nodes();
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

void llama_adapter_mems::reach_layer(float kq_scale, int il) {
    for (const auto & item : items) {
        const auto & mem = *item.adapter;
        if (std::fabs(mem.kq_scale - kq_scale) > 1e-5f*std::fabs(kq_scale)) {
            throw std::runtime_error(format("unsupported: layer %d scales attention by %g, the memory was built with %g", il, kq_scale, mem.kq_scale));
        }
        if (!mem.layers[il].has_lookup(lookup)) {
            throw std::runtime_error(format("unsupported: layer %d is on a device that does not have this lookup", il));
        }
    }

    layers_reached[il] = true;
}

uint64_t llama_adapter_mems::n_tables(int il) const {
    uint64_t res = 0;
    for (const auto & item : items) {
        for (const auto & segment : item.adapter->layers[il].segments) {
            for (const auto & entries : segment) {
                res += entries.n_all() > 0;
            }
        }
    }
    return res;
}

// the attention of a layer is built without data, to count its nodes
uint64_t llama_adapter_mems::get_n_nodes(int il) const {
    const auto & hparams = items[0].adapter->model->hparams;

    // room for far more than it takes: memory that is not touched costs nothing
    const uint64_t n_room = 64 + (has_op(il) ? 8*n_tables(il) : 64*(1 + n_tables(il))*hparams.n_head_kv(il));
    if (n_room > MEM_MAX_NODES) {
        throw std::runtime_error(format("unsupported: the memories have too many segments (%" PRIu64 " tables in layer %d)", n_tables(il), il));
    }
    ggml_context_ptr ctx_ptr { ggml_init({ n_room*ggml_tensor_overhead(), nullptr, true }) };
    ggml_context * ctx = ctx_ptr.get();
    if (!ctx) {
        throw std::runtime_error("out_of_memory: cannot allocate the graph of a layer");
    }

    const int64_t d_k = hparams.n_embd_head_k(il);
    const int64_t d_v = hparams.n_embd_head_v(il);

    ggml_tensor * q     = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, d_k, 1, hparams.n_head(il));
    ggml_tensor * k     = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, d_k, 1, hparams.n_head_kv(il));
    ggml_tensor * v_t   = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, 1, d_v, hparams.n_head_kv(il));
    ggml_tensor * mask  = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, 1);
    ggml_tensor * k_rot = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, d_k, d_k);
    ggml_tensor * v_rot = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, d_v, d_v);

    const float kq_scale = items[0].adapter->kq_scale;
    if (has_op(il)) {
        // a graph has either of them
        build_state_rotated(ctx, q, kq_scale, k_rot, v_rot, il);
        build_attn_op      (ctx, q, k, v_t, mask, kq_scale, k_rot, il);
    } else {
        build_attn_stock   (ctx, q, k, v_t, mask, kq_scale, il);
    }

    uint64_t res = 0;
    for (ggml_tensor * t = ggml_get_first_tensor(ctx); t; t = ggml_get_next_tensor(ctx, t)) {
        res++;
    }
    for (const auto & item : items) {
        for (const auto & segment : item.adapter->layers[il].segments) {
            for (const auto & entries : segment) {
                res += entries.n_tensors(); // leafs of the graph
            }
        }
    }
    return res;
}

uint64_t llama_adapter_mems::get_n_nodes() const {
    uint64_t res = 0;
    for (int il = 0; il < (int) layers_reached.size(); il++) {
        if (has_layer(il)) {
            res += get_n_nodes(il);
        }
    }
    if (res > MEM_MAX_NODES) {
        throw std::runtime_error(format("unsupported: the memories have too many segments (%" PRIu64 " graph nodes)", res));
    }
    return res;
}
