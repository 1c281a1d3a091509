#pragma once

#include "llama.h"

#include "ggml-cpp.h"

#include <algorithm>
#include <array>
#include <iterator>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

struct llama_cparams;
struct llama_adapter_cvec;
struct llama_adapter_lora;
struct mem_file;

using llama_adapter_loras = std::unordered_map<llama_adapter_lora *, float>;

//
// llama_adapter_mem - attention-state memory
//
// A memory stands for a prefix that is not in the context. For a query q of one head it gives the attention state
// (o, lse) of that prefix, which is merged with the attention over the live tokens by the online softmax.
// File format: docs/memory-format.md
//

// the kinds of entries, by ggml_mem_kind: ggml.h says how a kind gives a state
struct llama_adapter_mem_kind {
    ggml_mem_kind kind;
    const char *  name;        // in the names of tensors
    bool          has_lse;
    bool          allow_empty; // the lse of an entry may be -INFINITY, the empty state
    bool          is_searched; // the entries may have a search graph and lists
};

constexpr llama_adapter_mem_kind LLAMA_ADAPTER_MEM_KINDS[] = {
    { GGML_MEM_CENTROID, "centroid", true,  true,  true  },
    { GGML_MEM_TANGENT,  "tangent",  false, false, true  },
    { GGML_MEM_RESIDUAL, "residual", true,  false, true  },
    { GGML_MEM_TOKEN,    "token",    false, false, true  },
    { GGML_MEM_ANCHOR,   "anchor",   false, false, false },
};

// the entries of one kind in one segment of one layer; the KV heads lie one after another
struct llama_adapter_mem_entries {
    ggml_tensor * key   = nullptr; // [n_embd_head_k, n]
    ggml_tensor * bias  = nullptr; // [n] f32
    ggml_tensor * value = nullptr; // [n_embd_head_v, n]
    ggml_tensor * lse   = nullptr; // [n] f32, centroids and residuals only
    ggml_tensor * head  = nullptr; // [n_head_kv + 1, 2 or 3] i32: first entry of each head, local entry where its walk begins, first list

    // optional HNSW graph, all ids are local to their head
    ggml_tensor * link0 = nullptr; // [m0, n] i32, neighbours on level 0, -1 fills the rest
    ggml_tensor * link  = nullptr; // [m, n_upper] i32, neighbours on the levels above
    ggml_tensor * upper = nullptr; // [n + 1] i32, entry i has the rows upper[i] .. upper[i + 1] - 1 of link, level 1 first

    // optional lists of neighbouring entries
    ggml_tensor * list_key  = nullptr; // [n_embd_head_k, n_list]
    ggml_tensor * list_bias = nullptr; // [n_list] f32
    ggml_tensor * list      = nullptr; // [n_list + 1] i32, first entry of each list

    std::vector<int32_t> offset; // [n_head_kv + 1], head h has the entries offset[h] .. offset[h + 1] - 1

    bool is_indexed = false; // the file has a graph or lists, which hold for the rows in the file

    bool empty() const { return offset.empty(); }

    int64_t n(int64_t h) const { return empty() ? 0 : offset[h + 1] - offset[h]; }
    int64_t n_all()      const { return empty() ? 0 : offset.back(); }

    // entries of the largest head
    int64_t n_max() const {
        int64_t res = 0;
        for (int64_t h = 0; h + 1 < (int64_t) offset.size(); h++) {
            res = std::max(res, n(h));
        }
        return res;
    }

    uint64_t n_tensors() const;
};

constexpr ggml_tensor * llama_adapter_mem_entries::* LLAMA_ADAPTER_MEM_TENSORS[] = {
    &llama_adapter_mem_entries::key,
    &llama_adapter_mem_entries::bias,
    &llama_adapter_mem_entries::value,
    &llama_adapter_mem_entries::lse,
    &llama_adapter_mem_entries::head,
    &llama_adapter_mem_entries::link0,
    &llama_adapter_mem_entries::link,
    &llama_adapter_mem_entries::upper,
    &llama_adapter_mem_entries::list_key,
    &llama_adapter_mem_entries::list_bias,
    &llama_adapter_mem_entries::list,
};

inline uint64_t llama_adapter_mem_entries::n_tensors() const {
    return std::count_if(std::begin(LLAMA_ADAPTER_MEM_TENSORS), std::end(LLAMA_ADAPTER_MEM_TENSORS), [&](auto t) { return this->*t; });
}

// by ggml_mem_kind
using llama_adapter_mem_segment = std::array<llama_adapter_mem_entries, std::size(LLAMA_ADAPTER_MEM_KINDS)>;

struct llama_adapter_mem_layer {
    std::vector<llama_adapter_mem_segment> segments;

    bool is_host = true; // the tables are in memory that the CPU can read
    bool has_op  = true; // the device of the layer supports GGML_OP_MEM_STATE for them

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

    // several contexts, in several threads, may use it: see llama_adapter_mem_acquire
    mutable int  n_attached = 0;
    mutable bool is_freed   = false; // and is deleted with the last use

    explicit llama_adapter_mem(llama_model * model) : model(model) {}
    ~llama_adapter_mem() = default;

    // data is used in place and must stay valid as long as the memory
    // throws std::runtime_error("<reason>: <explanation>")
    void load(void * data, size_t size);

    // see llama_adapter_mem_set_rows; throws std::runtime_error("<reason>: <explanation>")
    void set_rows(const std::string & tensor_name, int64_t first, int64_t n, const void * data, size_t size);

private:
    // a tensor whose rows set_rows can overwrite
    struct rows {
        ggml_tensor * tensor;
        int64_t n;
        size_t  size;        // bytes of a row
        bool    allow_empty; // a row may be -INFINITY
        bool    is_indexed;
    };
    std::unordered_map<std::string, rows> rows_by_name;

    // tables are used in place where the CPU computes the layer, and copied to the device of the layer elsewhere
    std::vector<ggml_context_ptr>        ctxs;
    std::vector<ggml_backend_buffer_ptr> bufs;

    void load_segments(const mem_file & file, uint32_t n_segments);

    void place(mem_file & file, void * data, size_t size);
    void index_rows();
};

// counts the sets of memories that an adapter is in, for all threads; the last release deletes one that was freed meanwhile
void llama_adapter_mem_acquire(const llama_adapter_mem * adapter);
void llama_adapter_mem_release(const llama_adapter_mem * adapter);

// the memories that are attached to a context
struct llama_adapter_mems {
    struct item {
        const llama_adapter_mem * adapter;
        float gain; // added to the log-sum-exp
    };

    std::vector<item> items;
    llama_mem_lookup  lookup = LLAMA_MEM_LOOKUP_AUTO;

    llama_adapter_mems() = default;
    ~llama_adapter_mems();

    llama_adapter_mems(const llama_adapter_mems &) = delete;
    llama_adapter_mems & operator=(const llama_adapter_mems &) = delete;

    // throws std::runtime_error if a gain is neither a finite number nor -INFINITY
    llama_adapter_mems(const llama_adapter_mem * const * adapters, const float * gains, size_t n_adapters, llama_mem_lookup lookup);

    bool has_layer(int il) const;

    // tables of a layer that are not empty
    uint64_t n_tables(int il) const;

    // nodes and leafs that the memories add to a graph, at most
    // throws std::runtime_error if they are too many
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
    // nullptr if the layer needs build_attn; throws std::runtime_error for what is not supported
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

    // the state by GGML_OP_MEM_STATE, for a q that is not rotated: one op for each table, and one more to merge a table of residuals
    ggml_tensor * build_state_op(ggml_context * ctx, ggml_tensor * q, float kq_scale, int il) const;

private:
    std::vector<bool> layers_reached; // layers whose attention was built with their memory

    // whether the layer uses GGML_OP_MEM_STATE; stock ops otherwise
    bool has_op(int il) const;

    // records that the attention of the layer is built with its memory
    // throws std::runtime_error for what is not supported
    void reach_layer(float kq_scale, int il);

    uint64_t get_n_nodes(int il) const;

    ggml_tensor * build_state_rotated(ggml_context * ctx, ggml_tensor * q, float kq_scale, ggml_tensor * k_rot, ggml_tensor * v_rot, int il) const;

    ggml_tensor * build_attn_op   (ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v_t,
                                   ggml_tensor * kq_mask, float kq_scale, ggml_tensor * k_rot, int il) const;
    ggml_tensor * build_attn_stock(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * v_t,
                                   ggml_tensor * kq_mask, float kq_scale, int il) const;

    // live logits [n_kv, n_tokens, n_head of q], scaled and masked
    static ggml_tensor * build_kq(ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * kq_mask, float kq_scale);
};

using llama_adapter_mems_ptr = std::unique_ptr<llama_adapter_mems>;
