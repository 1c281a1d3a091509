// a memory from the content of its file, which is not trusted: each field, offset, type and index is checked before it is used

#include "llama-adapter-mem-file.h"
#include "llama-adapter-mem-fingerprint.h"
#include "llama-adapter-mem.h"

#include "llama-arch.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <cstring>
#include <iterator>

static constexpr uint32_t MEM_FORMAT_VERSION   = 2;
static constexpr uint32_t MEM_MAX_SEGMENTS     = 256;
static constexpr uint32_t MEM_MAX_TOP_K        = 1024;
static constexpr uint64_t MEM_MAX_KV_HEADS     = 1 << 22; // in all layers of all segments
static constexpr size_t   MEM_MAX_KIND_TENSORS = 12;      // of one kind in one segment of one layer

static constexpr std::initializer_list<ggml_type> MEM_TABLE_TYPES = { GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_Q8_0 };

//
// keys
//

static void mem_check_format(const mem_file & file) {
    LLM_KV kv(LLM_ARCH_UNKNOWN);

    auto is = [&](const std::string & key, const char * expected) {
        const auto it = file.keys.find(key);
        return it != file.keys.end() && it->second.type == GGUF_TYPE_STRING && mem_file::to_string(it->second) == expected;
    };
    if (!is(kv(LLM_KV_GENERAL_TYPE), "adapter") || !is(kv(LLM_KV_ADAPTER_TYPE), "attention_state_memory")) {
        mem_refuse("not_a_memory: the GGUF file is not an attention-state memory");
    }
    const uint32_t version = file.u32("attnmem.version");
    if (version != MEM_FORMAT_VERSION) {
        mem_refuse(format("version: the memory has format version %u, this build reads version %u; build it again", version, MEM_FORMAT_VERSION));
    }
    const uint32_t alignment = file.u32(GGUF_KEY_GENERAL_ALIGNMENT);
    if (alignment != MEM_ALIGNMENT) {
        mem_refuse(format("invalid: the tensors are aligned to %u bytes, expected %zu", alignment, MEM_ALIGNMENT));
    }
}

// whether a model of this kind can take a memory
static void mem_check_supported(const llama_model & model) {
    const auto & hparams = model.hparams;

    const char * unsupported =
        hparams.is_mla()                                  ? "multi-head latent attention" :
        hparams.use_alibi || hparams.f_max_alibi_bias > 0 ? "ALiBi" :
        hparams.attn_soft_cap                             ? "soft-capped attention logits" :
        hparams.swa_type != LLAMA_SWA_TYPE_NONE           ? "sliding-window attention" :
        llm_arch_is_recurrent(model.arch)                 ? "a recurrent model" :
        llm_arch_is_hybrid(model.arch)                    ? "a hybrid recurrent model" :
        llm_arch_is_diffusion(model.arch)                 ? "a diffusion model" :
        llama_model_has_encoder(&model)                   ? "an encoder" :
        model.arch == LLM_ARCH_GROK                       ? "soft-capped attention logits" :
        hparams.rope_type != LLAMA_ROPE_TYPE_NORM && hparams.rope_type != LLAMA_ROPE_TYPE_NEOX ? "positions other than RoPE" : nullptr;
    if (unsupported) {
        mem_refuse(format("unsupported: the architecture '%s' has %s, which cannot take a memory", model.arch_name().c_str(), unsupported));
    }
}

// whether the memory was built for this model
static void mem_check_same_model(const mem_file & file, const llama_model & model) {
    LLM_KV kv(LLM_ARCH_UNKNOWN);
    const auto & hparams = model.hparams;

    auto expect = [&](const char * what, const std::string & memory, const std::string & model_has) {
        if (memory != model_has) {
            mem_refuse(format("wrong_model: the memory was built for a model with %s %s, this one has %s", what, memory.c_str(), model_has.c_str()));
        }
    };
    auto expect_u32 = [&](const char * what, const char * key, uint32_t model_has) {
        expect(what, std::to_string(file.u32(key)), std::to_string(model_has));
    };
    expect("architecture", file.str(kv(LLM_KV_GENERAL_ARCHITECTURE)), model.arch_name());
    expect_u32("block count", "attnmem.block_count", hparams.n_layer());
    for (uint32_t il = 0; il < hparams.n_layer(); il++) {
        expect_u32("head count",    "attnmem.attention.head_count",    hparams.n_head(il));
        expect_u32("KV head count", "attnmem.attention.head_count_kv", hparams.n_head_kv(il));
        expect_u32("key length",    "attnmem.attention.key_length",    hparams.n_embd_head_k(il));
        expect_u32("value length",  "attnmem.attention.value_length",  hparams.n_embd_head_v(il));
    }
    expect("tokenizer fingerprint", file.str("attnmem.fingerprint.vocab"), mem_fingerprint_vocab(model));

    const std::string norms = mem_fingerprint_norms(model);
    if (file.str("attnmem.fingerprint.norms") != norms) {
        mem_refuse(format("wrong_finetune: the memory was built for weights with fingerprint %s, this model has %s: another fine-tune of '%s'",
            file.str("attnmem.fingerprint.norms").c_str(), norms.c_str(), model.arch_name().c_str()));
    }
}

static float mem_load_scale(const mem_file & file, const char * key) {
    const float x = file.f32(key);
    if (x <= 0 || x > MEM_MAX_ABS) {
        mem_refuse(format("invalid: the key '%s' is %g, expected more than 0 and at most %g", key, x, MEM_MAX_ABS));
    }
    return x;
}

static std::vector<llama_token> mem_load_prefix(const mem_file & file, const llama_model & model) {
    const std::vector<llama_token> res = file.arr_i32("attnmem.prefix.tokens");
    for (const llama_token id : res) {
        if (id < 0 || id >= (llama_token) model.vocab.n_tokens()) {
            mem_refuse(format("invalid: the prefix has token %d, the vocabulary %u tokens", id, model.vocab.n_tokens()));
        }
    }
    return res;
}

// keys that are shown to users and take no part in any computation
static void mem_check_about(const mem_file & file) {
    auto starts_with = [](const std::string & s, const char * prefix) { return s.compare(0, strlen(prefix), prefix) == 0; };

    bool has_fidelity = false;
    for (const auto & [key, v] : file.keys) {
        if (starts_with(key, "attnmem.prefix.") && key != "attnmem.prefix.tokens") {
            file.str(key);
        }
        if (starts_with(key, "attnmem.fidelity.")) {
            file.f32(key);
            has_fidelity = true;
        }
        if (starts_with(key, "attnmem.build.")) {
            switch (v.type) {
                case GGUF_TYPE_UINT32:  break;
                case GGUF_TYPE_FLOAT32: file.f32(key); break;
                default:                file.str(key);
            }
        }
    }
    file.str("attnmem.prefix.text");
    if (has_fidelity) {
        for (const char * name : { "kl_mean", "kl_none", "top1", "nll_full", "nll_memory", "nll_none", "tokens" }) {
            file.f32(std::string("attnmem.fidelity.") + name);
        }
    }
}

//
// tables
//

static void mem_check_finite(const mem_file & file, const ggml_tensor * t, bool allow_empty = false) {
    if (!mem_is_finite(t->type, file.data(t), ggml_nelements(t), allow_empty)) {
        mem_refuse(format("invalid: the tensor '%s' has a value that is not finite or too large", t->name));
    }
}

// offsets that ascend from 0 to n
static void mem_check_offsets(const char * name, const int32_t * offset, int64_t n_offset, int64_t n) {
    bool ok = offset[0] == 0 && offset[n_offset - 1] == n;
    for (int64_t i = 1; i < n_offset; i++) {
        ok &= offset[i - 1] <= offset[i];
    }
    if (!ok) {
        mem_refuse(format("invalid: the offsets in '%s' do not ascend from 0 to %" PRId64, name, n));
    }
}

static uint32_t mem_load_n_segments(const mem_file & file, size_t n_prefix_tokens) {
    const uint32_t res = file.u32("attnmem.segment.count");
    if (res < 1 || res > MEM_MAX_SEGMENTS) {
        mem_refuse(format("invalid: %u segments, expected 1 to %u", res, MEM_MAX_SEGMENTS));
    }
    const std::vector<int32_t> offset = file.arr_i32("attnmem.segment.offset");
    if (offset.size() != res + 1) {
        mem_refuse(format("invalid: 'attnmem.segment.offset' has %zu values, expected %u", offset.size(), res + 1));
    }
    mem_check_offsets("attnmem.segment.offset", offset.data(), res + 1, n_prefix_tokens);
    return res;
}

// 0 if the file has no such key
static int64_t mem_load_top_k(const mem_file & file) {
    const char * key = "attnmem.token.top_k";
    if (!file.keys.count(key)) {
        return 0;
    }
    const uint32_t res = file.u32(key);
    if (res < 1 || res > MEM_MAX_TOP_K) {
        mem_refuse(format("invalid: the key '%s' is %u, expected 1 to %u", key, res, MEM_MAX_TOP_K));
    }
    return res;
}

static void mem_load_graph(const mem_file & file, const std::string & prefix, llama_adapter_mem_entries & entries) {
    const int64_t n         = entries.key->ne[1];
    const int64_t n_head_kv = entries.offset.size() - 1;

    entries.link0 = file.tensor(prefix + "link0", {GGML_TYPE_I32}, -1, n);
    entries.link  = file.tensor(prefix + "link",  {GGML_TYPE_I32}, -1, -1);
    entries.upper = file.tensor(prefix + "upper", {GGML_TYPE_I32}, n + 1);

    const int32_t * link0 = file.data_i32(entries.link0);
    const int32_t * link  = file.data_i32(entries.link);
    const int32_t * upper = file.data_i32(entries.upper);
    const int32_t * entry = file.data_i32(entries.head) + n_head_kv + 1;

    const int64_t m0 = entries.link0->ne[0];
    const int64_t m  = entries.link->ne[0];

    // without upper levels there is still one row of link, unused, because a GGUF tensor cannot be empty
    mem_check_offsets(entries.upper->name, upper, n + 1, std::clamp<int64_t>(upper[n], 0, entries.link->ne[1]));

    for (int64_t h = 0; h < n_head_kv; h++) {
        const int32_t first = entries.offset[h];
        const int32_t n_h   = (int32_t) entries.n(h);

        bool ok = n_h == 0 || (entry[h] >= 0 && entry[h] < n_h);

        const int32_t * begin = link0 + (int64_t) first*m0;
        int bad = 0;
        for (int64_t i = 0; i < (int64_t) n_h*m0; i++) {
            bad |= (begin[i] < -1) | (begin[i] >= n_h);
        }
        ok = ok && !bad;
        // a link on level l must lead to an entry that has a level l, or the search would leave the table
        for (int32_t i = 0; ok && i < n_h; i++) {
            for (int32_t row = upper[first + i]; row < upper[first + i + 1]; row++) {
                const int32_t level = row - upper[first + i];
                for (int64_t j = 0; j < m; j++) {
                    const int32_t to = link[(int64_t) row*m + j];
                    ok &= to == -1 || (to >= 0 && to < n_h && upper[first + to + 1] - upper[first + to] > level);
                }
            }
        }
        if (!ok) {
            mem_refuse(format("invalid: a link of the graph '%s' of head %" PRId64 " leaves its table", entries.link0->name, h));
        }
    }
}

// no list is empty, so that a search always finds an entry
static void mem_load_lists(const mem_file & file, const std::string & prefix, llama_adapter_mem_entries & entries) {
    const int64_t n_offset = entries.offset.size();

    entries.list_key  = file.tensor(prefix + "list_key",  MEM_TABLE_TYPES, entries.key->ne[0], -1);
    const int64_t n_list = entries.list_key->ne[1];
    entries.list_bias = file.tensor(prefix + "list_bias", {GGML_TYPE_F32}, n_list);
    entries.list      = file.tensor(prefix + "list",      {GGML_TYPE_I32}, n_list + 1);
    mem_check_finite(file, entries.list_key);
    mem_check_finite(file, entries.list_bias);

    const int32_t * list  = file.data_i32(entries.list);
    const int32_t * first = file.data_i32(entries.head) + 2*n_offset;

    mem_check_offsets(entries.list->name, list,  n_list + 1, entries.offset.back());
    mem_check_offsets(entries.head->name, first, n_offset,   n_list);

    bool ok = std::adjacent_find(list, list + n_list + 1) == list + n_list + 1;
    for (int64_t h = 0; h < n_offset; h++) {
        ok = ok && list[first[h]] == entries.offset[h];
    }
    if (!ok) {
        mem_refuse(format("invalid: a list in '%s' is empty or leaves its head", entries.list->name));
    }
}

static llama_adapter_mem_entries mem_load_entries(
        const mem_file & file, const std::string & prefix, const llama_adapter_mem_kind & kind, const llama_hparams & hparams, int il) {
    llama_adapter_mem_entries res;
    if (!file.tensor(prefix + "key")) {
        return res;
    }

    const int64_t n_head_kv = hparams.n_head_kv(il);

    res.key   = file.tensor(prefix + "key",   MEM_TABLE_TYPES, hparams.n_embd_head_k(il), -1);
    const int64_t n = res.key->ne[1];
    res.value = file.tensor(prefix + "value", MEM_TABLE_TYPES, hparams.n_embd_head_v(il), n);
    res.bias  = file.tensor(prefix + "bias",  {GGML_TYPE_F32}, n);
    mem_check_finite(file, res.key);
    mem_check_finite(file, res.value);
    mem_check_finite(file, res.bias);
    if (kind.has_lse) {
        res.lse = file.tensor(prefix + "lse", {GGML_TYPE_F32}, n);
        mem_check_finite(file, res.lse, kind.allow_empty);
    }

    const bool has_graph = kind.is_searched && file.tensor(prefix + "link0");
    const bool has_lists = kind.is_searched && file.tensor(prefix + "list");

    res.head = file.tensor(prefix + "head", {GGML_TYPE_I32}, n_head_kv + 1, has_lists ? 3 : 2);
    mem_check_offsets(res.head->name, file.data_i32(res.head), n_head_kv + 1, n);
    res.offset.assign(file.data_i32(res.head), file.data_i32(res.head) + n_head_kv + 1);

    if (has_graph) {
        mem_load_graph(file, prefix, res);
    }
    if (has_lists) {
        mem_load_lists(file, prefix, res);
    }
    res.is_indexed = has_graph || has_lists;

    return res;
}

static llama_adapter_mem_segment mem_load_segment(const mem_file & file, const std::string & prefix, const llama_hparams & hparams, int il) {
    llama_adapter_mem_segment res;
    for (const auto & kind : LLAMA_ADAPTER_MEM_KINDS) {
        res[kind.kind] = mem_load_entries(file, prefix + kind.name + ".", kind, hparams, il);
    }

    for (uint32_t h = 0; h < hparams.n_head_kv(il); h++) {
        if (res[GGML_MEM_RESIDUAL].n(h) > 0 && res[GGML_MEM_ANCHOR].n(h) == 0) {
            mem_refuse(format("invalid: '%sresidual' has a head without anchors to correct", prefix.c_str()));
        }
    }

    return res;
}

void llama_adapter_mem::load_segments(const mem_file & file, uint32_t n_segments) {
    const auto & hparams = model->hparams;

    size_t n_tensors = 0; // that are known

    layers.resize(hparams.n_layer());
    for (uint32_t is = 0; is < n_segments; is++) {
        for (uint32_t il = 0; il < hparams.n_layer(); il++) {
            llama_adapter_mem_segment segment = mem_load_segment(file, format("seg.%u.blk.%u.", is, il), hparams, il);

            int64_t n_entries = 0;
            for (const auto & entries : segment) {
                n_tensors += entries.n_tensors();
                n_entries += entries.n_all();
            }
            if (segment[GGML_MEM_TOKEN].n_all() > 0 && token_top_k == 0) {
                mem_refuse("invalid: the key 'attnmem.token.top_k' is missing");
            }
            if (n_entries > 0) {
                layers[il].segments.push_back(std::move(segment));
            }
        }
    }
    if (n_tensors != file.tensors.size()) {
        mem_refuse(format("invalid: the memory has %zu tensors, of which only %zu are known to this build; it may need a newer one",
            file.tensors.size(), n_tensors));
    }
}

void llama_adapter_mem::load(void * data, size_t size) {
    mem_file file(data, size);

    mem_check_format(file);
    mem_check_supported(*model);
    mem_check_same_model(file, *model);

    kq_scale        = mem_load_scale(file, "attnmem.attention.scale");
    rope_freq_base  = mem_load_scale(file, "attnmem.rope.freq_base");
    rope_freq_scale = mem_load_scale(file, "attnmem.rope.freq_scale");
    prefix_tokens   = mem_load_prefix(file, *model);

    mem_check_about(file);

    const uint32_t n_segments = mem_load_n_segments(file, prefix_tokens.size());
    token_top_k = mem_load_top_k(file);

    const auto & hparams = model->hparams;
    if ((uint64_t) n_segments*hparams.n_layer()*hparams.n_head_kv() > MEM_MAX_KV_HEADS) {
        mem_refuse(format("invalid: the KV heads of %u segments are too many", n_segments));
    }
    file.read_tensors(std::size(LLAMA_ADAPTER_MEM_KINDS)*MEM_MAX_KIND_TENSORS*n_segments*hparams.n_layer());

    load_segments(file, n_segments);

    for (const auto & [key, v] : file.keys) {
        if (v.type == GGUF_TYPE_STRING || v.type == GGUF_TYPE_UINT32 || v.type == GGUF_TYPE_FLOAT32) {
            gguf_kv.emplace(key, mem_file::to_text(v));
        }
    }

    place(file, data, size);

    LLAMA_LOG_INFO("%s: loaded %zu tensors, %.2f MiB, for a prefix of %zu tokens\n", __func__,
        file.tensors.size(), size/1024.0/1024.0, prefix_tokens.size());
}
