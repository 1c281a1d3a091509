// loading a memory: its data is untrusted, every field, offset, type and index is checked before it is used

#include "llama-adapter-mem-file.h"
#include "llama-adapter-mem.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstring>
#include <iterator>
#include <map>

#ifdef __GLIBC__
#include <malloc.h>
#endif

static constexpr uint32_t MEM_FORMAT_VERSION = 2;
static constexpr uint32_t MEM_MAX_SEGMENTS   = 256;
static constexpr uint32_t MEM_MAX_TOP_K      = 1024;
static constexpr uint64_t MEM_MAX_KV_HEADS   = 1 << 22; // in all layers of all segments
static constexpr float    MEM_MAX_ABS        = 1e15f; // larger numbers could overflow in a product

//
// fingerprint of a model that survives quantization
//

static constexpr uint64_t MEM_HASH_INIT = 0xcbf29ce484222325ull;

// FNV-1a, 64 bit, over words of 8 bytes: byte by byte, a vocabulary would take as long as the rest of a load
static void mem_hash(uint64_t & hash, uint64_t x) {
    hash = (hash ^ x)*0x100000001b3ull;
}

// the bytes, filled up with zeros to whole words, then how many there were
static void mem_hash(uint64_t & hash, const void * data, size_t size) {
    const uint8_t * p = (const uint8_t *) data;
    size_t n = size;
    for (; n >= 8; n -= 8, p += 8) {
        mem_hash(hash, mem_load<uint64_t>(p));
    }
    // without a loop: its end could not be predicted
    if (n >= 4) {
        mem_hash(hash, mem_load<uint32_t>(p) | (uint64_t) mem_load<uint32_t>(p + n - 4) << 8*(n - 4));
    } else if (n > 0) {
        mem_hash(hash, p[0] | (uint64_t) p[n/2] << 8*(n/2) | (uint64_t) p[n - 1] << 8*(n - 1));
    }
    mem_hash(hash, size);
}

// the norm tensors, which every quantization keeps in F32, by name
static std::string mem_fingerprint_norms(const llama_model & model) {
    std::map<std::string, const ggml_tensor *> norms;
    for (const auto & [name, tensor] : model.tensors_by_name) {
        const std::string suffix = "norm.weight";
        if (name.size() >= suffix.size() && name.compare(name.size() - suffix.size(), suffix.size(), suffix) == 0) {
            norms[name] = tensor;
        }
    }

    uint64_t hash = MEM_HASH_INIT;
    std::vector<uint8_t> data;
    for (const auto & [name, tensor] : norms) {
        data.resize(ggml_nbytes(tensor));
        ggml_backend_tensor_get(tensor, data.data(), 0, data.size());
        mem_hash(hash, name.data(), name.size());
        mem_hash(hash, data.data(), data.size());
    }
    return format("%016" PRIx64, hash);
}

static std::string mem_fingerprint_vocab(const llama_model & model) {
    uint64_t hash = MEM_HASH_INIT;
    const llama_token n = model.vocab.n_tokens();
    for (llama_token id = 0; id < n; id++) {
        const std::string & text = model.vocab.get_token_data(id).text;
        mem_hash(hash, text.data(), text.size());
    }
    return format("%016" PRIx64, hash);
}

//
// the file
//

namespace {

bool mem_starts_with(const std::string & s, const char * prefix) {
    return s.compare(0, strlen(prefix), prefix) == 0;
}

// keys that are told to users, and not computed with
void mem_check_about(const mem_file & file) {
    bool has_fidelity = false;
    for (const auto & [key, v] : file.keys) {
        if (mem_starts_with(key, "attnmem.prefix.") && key != "attnmem.prefix.tokens") {
            file.str(key);
        }
        if (mem_starts_with(key, "attnmem.fidelity.")) {
            file.f32(key);
            has_fidelity = true;
        }
        if (mem_starts_with(key, "attnmem.build.")) {
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

void mem_check_model(const mem_file & file, const llama_model & model, llama_adapter_mem & mem) {
    LLM_KV kv(LLM_ARCH_UNKNOWN);

    // what this file is
    auto is = [&](const std::string & key, const char * expected) {
        const auto it = file.keys.find(key);
        return it != file.keys.end() && it->second.type == GGUF_TYPE_STRING && mem_file::to_string(it->second) == expected;
    };
    if (!is(kv(LLM_KV_GENERAL_TYPE), "adapter") || !is(kv(LLM_KV_ADAPTER_TYPE), "attention_state_memory")) {
        refuse("not_a_memory: the GGUF file is not an attention-state memory");
    }
    const uint32_t version = file.u32("attnmem.version");
    if (version != MEM_FORMAT_VERSION) {
        refuse(format("version: the memory has format version %u, this build reads version %u; build it again", version, MEM_FORMAT_VERSION));
    }

    if (file.u32(GGUF_KEY_GENERAL_ALIGNMENT) != MEM_ALIGNMENT) {
        refuse(format("invalid: the tensors are aligned to %u bytes, expected %zu", file.u32(GGUF_KEY_GENERAL_ALIGNMENT), MEM_ALIGNMENT));
    }

    // what this model is
    const auto & hparams = model.hparams;
    const std::string arch = model.arch_name();

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
        refuse(format("unsupported: the architecture '%s' has %s, which cannot take a memory", arch.c_str(), unsupported));
    }

    // whether they belong together
    auto expect = [&](const char * what, const std::string & memory, const std::string & model_has) {
        if (memory != model_has) {
            refuse(format("wrong_model: the memory was built for a model with %s %s, this one has %s", what, memory.c_str(), model_has.c_str()));
        }
    };
    expect("architecture",   file.str(kv(LLM_KV_GENERAL_ARCHITECTURE)),        arch);
    expect("block count",    std::to_string(file.u32("attnmem.block_count")),          std::to_string(hparams.n_layer()));
    for (uint32_t il = 0; il < hparams.n_layer(); il++) {
        expect("head count",    std::to_string(file.u32("attnmem.attention.head_count")),    std::to_string(hparams.n_head(il)));
        expect("KV head count", std::to_string(file.u32("attnmem.attention.head_count_kv")), std::to_string(hparams.n_head_kv(il)));
        expect("key length",    std::to_string(file.u32("attnmem.attention.key_length")),    std::to_string(hparams.n_embd_head_k(il)));
        expect("value length",  std::to_string(file.u32("attnmem.attention.value_length")),  std::to_string(hparams.n_embd_head_v(il)));
    }
    expect("tokenizer fingerprint", file.str("attnmem.fingerprint.vocab"), mem_fingerprint_vocab(model));

    const std::string norms = mem_fingerprint_norms(model);
    if (file.str("attnmem.fingerprint.norms") != norms) {
        refuse(format("wrong_finetune: the memory was built for weights with fingerprint %s, this model has %s: another fine-tune of '%s'",
            file.str("attnmem.fingerprint.norms").c_str(), norms.c_str(), arch.c_str()));
    }

    mem.kq_scale        = file.f32("attnmem.attention.scale");
    mem.rope_freq_base  = file.f32("attnmem.rope.freq_base");
    mem.rope_freq_scale = file.f32("attnmem.rope.freq_scale");
    for (const float x : { mem.kq_scale, mem.rope_freq_base, mem.rope_freq_scale }) {
        if (x <= 0 || x > MEM_MAX_ABS) {
            refuse(format("invalid: a scale is %g, expected more than 0 and at most %g", x, MEM_MAX_ABS));
        }
    }

    mem.prefix_tokens = file.arr_i32("attnmem.prefix.tokens");
    for (const llama_token id : mem.prefix_tokens) {
        if (id < 0 || id >= (llama_token) model.vocab.n_tokens()) {
            refuse(format("invalid: the prefix has token %d, the vocabulary %u tokens", id, model.vocab.n_tokens()));
        }
    }
}

// all numbers are finite and of moderate size; -INFINITY is allowed where it means an empty state
void mem_check_finite(const mem_file & file, const ggml_tensor * t, bool allow_minus_inf = false) {
    const int64_t n = ggml_nelements(t);
    int bad = 0; // no branches, so that the loops are vectorized: they see every number of the file
    if (t->type == GGML_TYPE_F32) {
        const float * x = (const float *) file.data(t);
        for (int64_t i = 0; i < n; i++) {
            bad |= !(std::fabs(x[i]) <= MEM_MAX_ABS) & !(allow_minus_inf & (x[i] == -INFINITY));
        }
    } else if (t->type == GGML_TYPE_F16) {
        const ggml_fp16_t * x = (const ggml_fp16_t *) file.data(t);
        for (int64_t i = 0; i < n; i++) {
            bad |= (x[i] & 0x7c00) == 0x7c00;
        }
    } else {
        // the F16 scale that each block of Q8_0 begins with
        const char * x = (const char *) file.data(t);
        const int64_t n_block = n/ggml_blck_size(t->type);
        const size_t  size    = ggml_type_size(t->type);
        for (int64_t i = 0; i < n_block; i++) {
            uint16_t bits;
            memcpy(&bits, x + i*size, sizeof(bits));
            bad |= (bits & 0x7c00) == 0x7c00;
        }
    }
    if (bad) {
        refuse(format("invalid: the tensor '%s' has a value that is not finite or too large", t->name));
    }
}

// ascending offsets from 0 to n
void mem_check_offsets(const char * name, const int32_t * offset, int64_t n_offset, int64_t n) {
    bool ok = offset[0] == 0 && offset[n_offset - 1] == n;
    for (int64_t i = 1; i < n_offset; i++) {
        ok &= offset[i - 1] <= offset[i];
    }
    if (!ok) {
        refuse(format("invalid: the offsets in '%s' do not ascend from 0 to %" PRId64, name, n));
    }
}

struct mem_kind {
    const char * name;

    llama_adapter_mem_entries llama_adapter_mem_segment::* entries;

    bool has_lse;
    bool allow_empty; // the state of an entry may be the empty one
    bool is_searched; // may have a graph and lists

    size_t n_tensors(const llama_adapter_mem_entries & e) const {
        return e.empty() ? 0 : 4 + has_lse + (e.link0 ? 3 : 0) + (e.list ? 3 : 0);
    }
};

constexpr mem_kind MEM_KINDS[] = {
    { "centroid", &llama_adapter_mem_segment::centroid, true,  true,  true  },
    { "tangent",  &llama_adapter_mem_segment::tangent,  false, false, true  },
    { "residual", &llama_adapter_mem_segment::residual, true,  false, true  },
    { "token",    &llama_adapter_mem_segment::token,    false, false, true  },
    { "anchor",   &llama_adapter_mem_segment::anchor,   false, false, false },
};

constexpr size_t MEM_MAX_KIND_TENSORS = 12; // of one kind in one segment of one layer

void mem_load_graph(const mem_file & file, const std::string & prefix, llama_adapter_mem_entries & entries) {
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
            refuse(format("invalid: a link of the graph '%s' of head %" PRId64 " leaves its table", entries.link0->name, h));
        }
    }
}

// no list is empty, so that a search always finds an entry
void mem_load_lists(const mem_file & file, const std::string & prefix, llama_adapter_mem_entries & entries) {
    const int64_t n_offset = entries.offset.size();

    entries.list_key  = file.tensor(prefix + "list_key",  {GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_Q8_0}, entries.key->ne[0], -1);
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
        refuse(format("invalid: a list in '%s' is empty or leaves its head", entries.list->name));
    }
}

llama_adapter_mem_entries mem_load_entries(const mem_file & file, const std::string & prefix, const mem_kind & kind, const llama_hparams & hparams, int il) {
    llama_adapter_mem_entries res;
    if (!file.tensor(prefix + "key")) {
        return res;
    }

    const int64_t n_head_kv = hparams.n_head_kv(il);

    res.key   = file.tensor(prefix + "key",   {GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_Q8_0}, hparams.n_embd_head_k(il), -1);
    const int64_t n = res.key->ne[1];
    res.value = file.tensor(prefix + "value", {GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_Q8_0}, hparams.n_embd_head_v(il), n);
    res.bias  = file.tensor(prefix + "bias",  {GGML_TYPE_F32}, n);
    mem_check_finite(file, res.key);
    mem_check_finite(file, res.value);
    mem_check_finite(file, res.bias);
    if (kind.has_lse) {
        res.lse = file.tensor(prefix + "lse", {GGML_TYPE_F32}, n);
        mem_check_finite(file, res.lse, kind.allow_empty);
    }

    const bool has_lists = kind.is_searched && file.tensor(prefix + "list");

    res.head = file.tensor(prefix + "head", {GGML_TYPE_I32}, n_head_kv + 1, has_lists ? 3 : 2);
    mem_check_offsets(res.head->name, file.data_i32(res.head), n_head_kv + 1, n);
    res.offset.assign(file.data_i32(res.head), file.data_i32(res.head) + n_head_kv + 1);

    if (kind.is_searched && file.tensor(prefix + "link0")) {
        mem_load_graph(file, prefix, res);
    }
    if (has_lists) {
        mem_load_lists(file, prefix, res);
    }

    return res;
}

llama_adapter_mem_segment mem_load_segment(const mem_file & file, const std::string & prefix, const llama_hparams & hparams, int il) {
    llama_adapter_mem_segment res;
    for (const auto & kind : MEM_KINDS) {
        res.*kind.entries = mem_load_entries(file, prefix + kind.name + ".", kind, hparams, il);
    }

    for (uint32_t h = 0; h < hparams.n_head_kv(il); h++) {
        if (res.residual.n(h) > 0 && res.anchor.n(h) == 0) {
            refuse(format("invalid: '%sresidual' has a head without anchors to correct", prefix.c_str()));
        }
    }

    return res;
}

// whether a device computes the states of a layer
bool mem_device_has_op(ggml_backend_dev_t dev, const llama_adapter_mem * mem, int il) {
    const float gain = 0.0f;
    const llama_adapter_mems mems(&mem, &gain, 1, LLAMA_MEM_LOOKUP_AUTO);

    const size_t n_tensors = 16 + mem->layers[il].segments.size()*(std::size(MEM_KINDS) + 1);
    ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*n_tensors, nullptr, true }) };
    if (!ctx) {
        return false;
    }

    const auto & hparams = mem->model->hparams;
    mems.build_state_op(ctx.get(), ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, hparams.n_embd_head_k(il), 1, hparams.n_head(il)), mem->kq_scale, il);

    for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
        if (t->op == GGML_OP_MEM_STATE && !ggml_backend_dev_supports_op(dev, t)) {
            return false;
        }
    }
    return true;
}

} // namespace

void llama_adapter_mem::load(const void * data, size_t size) {
    mem_file file(data, size);

    mem_check_model(file, *model, *this);
    mem_check_about(file);

    const uint32_t n_segments = file.u32("attnmem.segment.count");
    if (n_segments < 1 || n_segments > MEM_MAX_SEGMENTS) {
        refuse(format("invalid: %u segments, expected 1 to %u", n_segments, MEM_MAX_SEGMENTS));
    }
    const std::vector<int32_t> segment_offset = file.arr_i32("attnmem.segment.offset");
    if (segment_offset.size() != n_segments + 1) {
        refuse(format("invalid: 'attnmem.segment.offset' has %zu values, expected %u", segment_offset.size(), n_segments + 1));
    }
    mem_check_offsets("attnmem.segment.offset", segment_offset.data(), n_segments + 1, prefix_tokens.size());

    if (file.keys.count("attnmem.token.top_k")) {
        token_top_k = file.u32("attnmem.token.top_k");
        if (token_top_k < 1 || token_top_k > MEM_MAX_TOP_K) {
            refuse(format("invalid: the key 'attnmem.token.top_k' is %" PRId64 ", expected 1 to %u", token_top_k, MEM_MAX_TOP_K));
        }
    }

    const auto & hparams = model->hparams;

    if ((uint64_t) n_segments*hparams.n_layer()*hparams.n_head_kv() > MEM_MAX_KV_HEADS) {
        refuse(format("invalid: the KV heads of %u segments are too many", n_segments));
    }

    file.read_tensors(std::size(MEM_KINDS)*MEM_MAX_KIND_TENSORS*n_segments*hparams.n_layer());

    size_t n_tensors = 0;

    layers.resize(hparams.n_layer());
    for (uint32_t is = 0; is < n_segments; is++) {
        for (uint32_t il = 0; il < hparams.n_layer(); il++) {
            llama_adapter_mem_segment segment = mem_load_segment(file, format("seg.%u.blk.%u.", is, il), hparams, il);

            int64_t n_entries = 0;
            for (const auto & kind : MEM_KINDS) {
                n_tensors += kind.n_tensors(segment.*kind.entries);
                n_entries += (segment.*kind.entries).n_all();
            }

            if (segment.token.n_all() > 0 && token_top_k == 0) {
                refuse("invalid: the key 'attnmem.token.top_k' is missing");
            }

            if (n_entries > 0) {
                layers[il].segments.push_back(std::move(segment));
            }
        }
    }
    if (n_tensors != file.tensors.size()) {
        refuse(format("invalid: the memory has %zu tensors, of which only %zu are known to this build; it may need a newer one",
            file.tensors.size(), n_tensors));
    }

    // place the tables: where they are if the CPU computes the layer, in a buffer of its device elsewhere
    ggml_backend_buffer_ptr buf_host { ggml_backend_cpu_buffer_from_ptr(const_cast<void *>(data), size) };

    std::map<ggml_backend_buffer_type_t, ggml_context *> ctx_map;
    auto ctx_for_buft = [&](ggml_backend_buffer_type_t buft) {
        auto it = ctx_map.find(buft);
        if (it == ctx_map.end()) {
            ggml_context * ctx = ggml_init({ (n_tensors + 1)*ggml_tensor_overhead(), nullptr, true });
            if (!ctx) {
                refuse("out_of_memory: cannot allocate the tensors of the memory");
            }
            ctxs.emplace_back(ctx);
            it = ctx_map.emplace(buft, ctx).first;
        }
        return it->second;
    };

    std::vector<std::pair<ggml_tensor *, const void *>> copies; // tensor, where its data is in the file
    for (uint32_t il = 0; il < layers.size(); il++) {
        ggml_backend_buffer_type_t buft = model->select_buft(il);
        layers[il].is_host = ggml_backend_buft_is_host(buft);
        for (auto & segment : layers[il].segments) {
            for (const auto & kind : MEM_KINDS) {
                auto & entries = segment.*kind.entries;
                if (!layers[il].is_host) {
                    entries.link0 = entries.link = entries.upper = nullptr; // graphs are for the CPU
                }
                for (auto ** t : { &entries.key, &entries.bias, &entries.value, &entries.lse, &entries.head,
                                   &entries.link0, &entries.link, &entries.upper,
                                   &entries.list_key, &entries.list_bias, &entries.list }) {
                    if (*t == nullptr) {
                        continue;
                    }
                    const void * rows = file.data(*t);
                    if (layers[il].is_host) {
                        ggml_backend_tensor_alloc(buf_host.get(), *t, const_cast<void *>(rows));
                    } else {
                        ggml_tensor * copy = ggml_dup_tensor(ctx_for_buft(buft), *t);
                        ggml_set_name(copy, (*t)->name);
                        copies.emplace_back(copy, rows);
                        *t = copy;
                    }
                }
            }
        }
    }
    for (auto & [buft, ctx] : ctx_map) {
        ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx, buft);
        if (!buf) {
            refuse(format("out_of_memory: cannot allocate a buffer for the memory on %s", ggml_backend_buft_name(buft)));
        }
        bufs.emplace_back(buf);
    }
    for (auto & [t, rows] : copies) {
        ggml_backend_tensor_set(t, rows, 0, ggml_nbytes(t));
    }
    ctxs.push_back(std::move(file.meta));
    bufs.push_back(std::move(buf_host));
    for (auto & buf : bufs) {
        ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }

    for (uint32_t il = 0; il < layers.size(); il++) {
        layers[il].has_op = layers[il].is_host || layers[il].empty() || mem_device_has_op(model->dev_layer(il), this, il);
    }

    // scalar metadata for llama_adapter_mem_meta_*
    for (const auto & [key, v] : file.keys) {
        if (v.type == GGUF_TYPE_STRING || v.type == GGUF_TYPE_UINT32 || v.type == GGUF_TYPE_FLOAT32) {
            gguf_kv.emplace(key, mem_file::to_text(v));
        }
    }

    LLAMA_LOG_INFO("%s: loaded %zu tensors, %.2f MiB, for a prefix of %zu tokens\n", __func__,
        n_tensors, size/1024.0/1024.0, prefix_tokens.size());
}

//
// interface
//

static void mem_set_error(char * err, size_t err_size, const char * what) {
    LLAMA_LOG_ERROR("%s: %s\n", __func__, what);
    if (err && err_size > 0) {
        snprintf(err, err_size, "%s", what);
    }
}

llama_adapter_mem * llama_adapter_mem_init(llama_model * model, const void * data, size_t size, char * err, size_t err_size) {
    auto adapter = std::make_unique<llama_adapter_mem>(model);

    try {
        adapter->load(data, size);
    } catch (const std::exception & e) {
        mem_set_error(err, err_size, e.what());
        return nullptr;
    }

    model->mems.insert(adapter.get());

    return adapter.release();
}

void llama_adapter_mem_free(llama_adapter_mem * adapter) {
    if (adapter == nullptr) {
        return;
    }
    if (adapter->n_attached > 0) {
        LLAMA_LOG_ERROR("%s: the memory is still attached; it will be freed with the model\n", __func__);
        return;
    }
    adapter->model->mems.erase(adapter);
    delete adapter;
}

int32_t llama_adapter_mem_meta_val_str(const llama_adapter_mem * adapter, const char * key, char * buf, size_t buf_size) {
    const auto it = adapter->gguf_kv.find(key);
    if (it == adapter->gguf_kv.end()) {
        if (buf_size > 0) {
            buf[0] = '\0';
        }
        return -1;
    }
    return snprintf(buf, buf_size, "%s", it->second.c_str());
}

uint64_t llama_adapter_mem_n_prefix_tokens(const llama_adapter_mem * adapter) {
    return adapter->prefix_tokens.size();
}

const llama_token * llama_adapter_mem_prefix_tokens(const llama_adapter_mem * adapter) {
    return adapter->prefix_tokens.data();
}

int32_t llama_set_adapters_mem(
            llama_context * ctx,
        llama_adapter_mem ** adapters,
                  size_t   n_adapters,
                   float * gains,
        llama_mem_lookup   lookup,
                    char * err,
                  size_t   err_size) {
    try {
        ctx->set_adapters_mem(adapters, n_adapters, gains, lookup);
    } catch (const std::exception & e) {
        mem_set_error(err, err_size, e.what());
        return -1;
    }
#ifdef __GLIBC__
    malloc_trim(0); // the file's header and the buffers of smaller graphs leave holes in the heap
#endif
    return 0;
}
