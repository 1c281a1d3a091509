// where the tables of a memory lie: in the data it was loaded from if the CPU computes their layer, on the device of the layer elsewhere

#include "llama-adapter-mem-file.h"
#include "llama-adapter-mem.h"

#include "llama-impl.h"
#include "llama-model.h"

#include <cinttypes>
#include <map>
#include <utility>

// copies of tables, in one buffer for each buffer type
struct mem_copies {
    size_t max_tensors;

    std::map<ggml_backend_buffer_type_t, ggml_context_ptr> ctxs;

    std::vector<std::pair<ggml_tensor *, const void *>> todo; // copy, where its data is in the file

    ggml_tensor * add(ggml_backend_buffer_type_t buft, const ggml_tensor * t, const void * data) {
        ggml_context_ptr & ctx = ctxs[buft];
        if (!ctx) {
            ctx.reset(ggml_init({ (max_tensors + 1)*ggml_tensor_overhead(), nullptr, true }));
        }
        if (!ctx) {
            mem_refuse("out_of_memory: cannot allocate the tensors of the memory");
        }
        ggml_tensor * res = ggml_dup_tensor(ctx.get(), t);
        ggml_set_name(res, t->name);
        todo.emplace_back(res, data);
        return res;
    }

    std::vector<ggml_backend_buffer_ptr> alloc() {
        std::vector<ggml_backend_buffer_ptr> res;
        for (auto & [buft, ctx] : ctxs) {
            ggml_backend_buffer_t buf = ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft);
            if (!buf) {
                mem_refuse(format("out_of_memory: cannot allocate a buffer for the memory on %s", ggml_backend_buft_name(buft)));
            }
            res.emplace_back(buf);
        }
        for (auto & [t, data] : todo) {
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        }
        return res;
    }
};

// whether a device computes the states of a layer
static bool mem_device_has_op(ggml_backend_dev_t dev, const llama_adapter_mem * mem, int il) {
    const float gain = 0.0f;
    const llama_adapter_mems mems(&mem, &gain, 1, LLAMA_MEM_LOOKUP_AUTO);

    ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*(1 + 2*mems.n_tables(il)), nullptr, true }) };
    if (!ctx) {
        return false;
    }

    const auto & hparams = mem->model->hparams;
    ggml_tensor * q = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, hparams.n_embd_head_k(il), 1, hparams.n_head(il));
    mems.build_state_op(ctx.get(), q, mem->kq_scale, il);

    for (ggml_tensor * t = ggml_get_first_tensor(ctx.get()); t; t = ggml_get_next_tensor(ctx.get(), t)) {
        if (t->op == GGML_OP_MEM_STATE && !ggml_backend_dev_supports_op(dev, t)) {
            return false;
        }
    }
    return true;
}

void llama_adapter_mem::place(mem_file & file, void * data, size_t size) {
    ggml_backend_buffer_ptr buf_host { ggml_backend_cpu_buffer_from_ptr(data, size) };

    mem_copies copies = { file.tensors.size(), {}, {} };

    for (uint32_t il = 0; il < layers.size(); il++) {
        ggml_backend_buffer_type_t buft = model->select_buft(il);
        layers[il].is_host = ggml_backend_buft_is_host(buft);
        for (auto & segment : layers[il].segments) {
            for (auto & entries : segment) {
                if (!layers[il].is_host) {
                    entries.link0 = entries.link = entries.upper = nullptr; // only the CPU walks graphs
                }
                for (auto member : LLAMA_ADAPTER_MEM_TENSORS) {
                    ggml_tensor * & t = entries.*member;
                    if (t && layers[il].is_host) {
                        ggml_backend_tensor_alloc(buf_host.get(), t, const_cast<void *>(file.data(t)));
                    } else if (t) {
                        t = copies.add(buft, t, file.data(t));
                    }
                }
            }
        }
    }

    bufs = copies.alloc();
    for (auto & [buft, ctx] : copies.ctxs) {
        ctxs.push_back(std::move(ctx));
    }
    ctxs.push_back(std::move(file.meta));
    bufs.push_back(std::move(buf_host));
    for (auto & buf : bufs) {
        ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    }

    for (uint32_t il = 0; il < layers.size(); il++) {
        layers[il].has_op = layers[il].is_host || layers[il].empty() || mem_device_has_op(model->dev_layer(il), this, il);
    }

    index_rows();
}

//
// rows that are overwritten in place
//

void llama_adapter_mem::index_rows() {
    for (const auto & layer : layers) {
        for (const auto & segment : layer.segments) {
            for (const auto & kind : LLAMA_ADAPTER_MEM_KINDS) {
                const auto & entries = segment[kind.kind];
                for (ggml_tensor * t : { entries.key, entries.value }) {
                    if (t) {
                        rows_by_name[t->name] = { t, entries.n_all(), t->nb[1], false, entries.is_indexed };
                    }
                }
                for (ggml_tensor * t : { entries.bias, entries.lse }) {
                    if (t) {
                        rows_by_name[t->name] = { t, entries.n_all(), t->nb[0], kind.allow_empty && t == entries.lse, entries.is_indexed };
                    }
                }
            }
        }
    }
}

void llama_adapter_mem::set_rows(const std::string & tensor_name, int64_t first, int64_t n, const void * data, size_t size) {
    const char * name = tensor_name.c_str();
    const auto it = rows_by_name.find(tensor_name);
    if (it == rows_by_name.end()) {
        mem_refuse(format("invalid: the memory has no rows '%s'; expected the name of a key, value, bias or lse tensor, "
            "such as 'seg.0.blk.0.anchor.key'", name));
    }
    const rows & r = it->second;
    if (r.is_indexed) {
        mem_refuse(format("unsupported: '%s' has a search graph or lists, which do not hold for other rows; build the memory again", name));
    }
    if (first < 0 || n < 0 || first > r.n || n > r.n - first) {
        mem_refuse(format("invalid: %" PRId64 " rows from row %" PRId64 " on, but '%s' has %" PRId64 " rows", n, first, name, r.n));
    }
    if (size != n*r.size) {
        mem_refuse(format("invalid: %zu bytes for %" PRId64 " rows of '%s', expected %zu bytes of type %s for each row",
            size, n, name, r.size, ggml_type_name(r.tensor->type)));
    }
    if (!mem_is_finite(r.tensor->type, data, size/ggml_type_size(r.tensor->type)*ggml_blck_size(r.tensor->type), r.allow_empty)) {
        mem_refuse(format("invalid: a new row of '%s' has a value that is not finite or larger than %g", name, MEM_MAX_ABS));
    }
    ggml_backend_tensor_set(r.tensor, data, first*r.size, size);
}
