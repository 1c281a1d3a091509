#pragma once

#include "llama.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

struct llama_cparams;
struct llama_adapter_cvec;
struct llama_adapter_lora;

using llama_adapter_loras = std::unordered_map<llama_adapter_lora *, float>;

//
// llama_adapter_mem - attention-state memory
//
// A memory stands for a prefix that is not in the context. For a query q of one head it gives the attention state
// (o, lse) of that prefix, which is merged with the attention over the live tokens by the online softmax.
// File format: docs/memory-format.md
//

// the entries of one kind in one segment of one layer; the KV heads lie one after another
struct llama_adapter_mem_entries {
    ggml_tensor * key   = nullptr; // [n_embd_head_k, n]
    ggml_tensor * bias  = nullptr; // [n]
    ggml_tensor * value = nullptr; // [n_embd_head_v, n]
    ggml_tensor * lse   = nullptr; // [n], centroids and residuals only
    ggml_tensor * head  = nullptr; // [n_head_kv + 1, 2 or 3] first entry of each head, where a walk of its graph begins, first list

    // optional HNSW graph, all ids are local to their head
    ggml_tensor * link0 = nullptr; // [m0, n]     neighbours on level 0, -1 fills the rest
    ggml_tensor * link  = nullptr; // [m, n_upper] neighbours on the levels above
    ggml_tensor * upper = nullptr; // [n + 1]     entry i has the rows upper[i] .. upper[i + 1] - 1 of link, level 1 first

    // optional lists of neighbouring entries
    ggml_tensor * list_key  = nullptr; // [n_embd_head_k, n_list]
    ggml_tensor * list_bias = nullptr; // [n_list]
    ggml_tensor * list      = nullptr; // [n_list + 1] first entry of each list

    std::vector<int32_t> offset;   // [n_head_kv + 1], head h owns the entries offset[h] .. offset[h + 1] - 1

    bool empty() const { return offset.empty(); }

    int64_t n(int64_t h) const { return empty() ? 0 : offset[h + 1] - offset[h]; }
    int64_t n_all()      const { return empty() ? 0 : offset.back(); }

    // of the head with the most
    int64_t n_max() const {
        int64_t res = 0;
        for (int64_t h = 0; h + 1 < (int64_t) offset.size(); h++) {
            res = std::max(res, n(h));
        }
        return res;
    }
};

struct llama_adapter_mem_segment {
    llama_adapter_mem_entries centroid; // the entry with the largest key*q + bias gives its state (value, lse)
    llama_adapter_mem_entries tangent;  // the same, and that largest score is the lse
    llama_adapter_mem_entries residual; // the same, and (value, lse) is added to the state of the anchors
    llama_adapter_mem_entries token;    // the token_top_k entries with the largest kq_scale*key*q + bias are attended
    llama_adapter_mem_entries anchor;   // all are attended: logits kq_scale*key*q + bias
};

struct llama_adapter_mem_layer {
    std::vector<llama_adapter_mem_segment> segments;

    bool is_host = true; // the tables are in memory that the CPU can read
    bool has_op  = true; // the device of the layer has the op that looks them up

    bool empty() const { return segments.empty(); }

    bool has_lookup(llama_mem_lookup lookup) const {
        switch (lookup) {
            case LLAMA_MEM_LOOKUP_SCAN:
            case LLAMA_MEM_LOOKUP_LISTS: return has_op;
            case LLAMA_MEM_LOOKUP_HNSW:  return is_host;
            default:                     return true;
        }
    }
};

struct llama_adapter_mem {
    llama_model * model = nullptr;

    std::vector<llama_adapter_mem_layer> layers;

    std::vector<llama_token> prefix_tokens;

    float kq_scale        = 0.0f;
    float rope_freq_base  = 0.0f;
    float rope_freq_scale = 0.0f;

    int64_t token_top_k = 0;

    std::unordered_map<std::string, std::string> gguf_kv;

    // tables are used in place where the CPU computes the layer, and copied to the device of the layer elsewhere
    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;

    mutable int n_attached = 0; // contexts that use it

    explicit llama_adapter_mem(llama_model * model) : model(model) {}
    ~llama_adapter_mem() = default;

    // data must stay valid as long as the memory; throws std::runtime_error("<reason>: <explanation>")
    void load(const void * data, size_t size);
};

// the memories that are attached to a context
struct llama_adapter_mems {
    struct item {
        const llama_adapter_mem * adapter;
        float gain; // added to the log-sum-exp
    };

    std::vector<item>      items;
    llama_mem_lookup       lookup = LLAMA_MEM_LOOKUP_AUTO;
    std::vector<bool>      layers_reached; // layers whose attention was built with their memory

    llama_adapter_mems() = default;
    ~llama_adapter_mems();

    llama_adapter_mems(const llama_adapter_mems &) = delete;
    llama_adapter_mems & operator=(const llama_adapter_mems &) = delete;

    // throws std::runtime_error if a gain is not a finite number or -INFINITY
    llama_adapter_mems(const llama_adapter_mem * const * adapters, const float * gains, size_t n_adapters, llama_mem_lookup lookup);

    bool has_layer(int il) const;

    // what the memories add to a graph, at most: nodes, and leafs, which need room as well
    uint64_t get_n_nodes() const;

    bool same(llama_adapter_mem * const * adapters, const float * gains, size_t n_adapters, llama_mem_lookup lookup) const;

    // throws std::runtime_error if these memories cannot be used with this model, these context parameters and these other adapters
    void check(const llama_model & model, const llama_cparams & cparams, const llama_adapter_loras & loras, const llama_adapter_cvec & cvec) const;

    // throws std::runtime_error if the graph of this architecture did not ask for the memory of some layer
    void check_layers_reached() const;

    // q, k and v are rotated by k_rot and v_rot if those are not null, as a quantized KV cache has them; the tables are not
    //   k_rot, v_rot [n, n] symmetric, their own inverse

    // the state of all memories of the layer, for flash attention to merge with [n_embd_head_v + 1, n_head, n_tokens]
    //   q [n_embd_head_k, n_tokens, n_head]
    // nullptr where it has to be build_attn; throws std::runtime_error for what is not supported
    ggml_tensor * build_state(ggml_context * ctx, ggml_tensor * q, float kq_scale, ggml_tensor * k_rot, ggml_tensor * v_rot, int il);

    // attention over the live tokens and the memories of the layer
    //   q       [n_embd_head_k, n_tokens, n_head]
    //   k       [n_embd_head_k, n_kv,     n_head_kv]
    //   v_t     [n_kv, n_embd_head_v,     n_head_kv]
    //   kq_mask [n_kv, n_tokens]
    //   returns [n_embd_head_v, n_tokens, n_head]
    // throws std::runtime_error for what is not supported
    ggml_tensor * build_attn(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v_t,
                             ggml_tensor * kq_mask, float kq_scale, ggml_tensor * k_rot, ggml_tensor * v_rot, int il);

    // the state by the op, for a q that is not rotated; no checks
    ggml_tensor * build_state_op(ggml_context * ctx, ggml_tensor * q, float kq_scale, int il) const;

private:
    // whether the layer takes the op, or stock ops
    bool has_op(int il) const;

    // the same, for the graph; throws std::runtime_error for what is not supported
    bool use_op(float kq_scale, int il);

    ggml_tensor * build_attn_stock(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v_t,
                                   ggml_tensor * kq_mask, float kq_scale, int il) const;
    ggml_tensor * build_attn_op   (ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v_t,
                                   ggml_tensor * kq_mask, float kq_scale, ggml_tensor * k_rot, int il) const;
};

using llama_adapter_mems_ptr = std::unique_ptr<llama_adapter_mems>;
