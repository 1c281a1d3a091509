// the C interface of memories, see llama.h

#include "llama-adapter-mem.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <cstdio>
#include <exception>
#include <memory>
#include <mutex>

static void mem_set_error(char * err, size_t err_size, const char * what) {
    LLAMA_LOG_ERROR("%s: %s\n", __func__, what);
    if (err && err_size > 0) {
        snprintf(err, err_size, "%s", what);
    }
}

// guards the memories of all models and their use: contexts of one model may run in several threads
static std::mutex mem_mutex;

static void mem_delete_unused(const llama_adapter_mem * adapter) {
    if (adapter->is_freed && adapter->n_attached == 0) {
        adapter->model->mems.erase(const_cast<llama_adapter_mem *>(adapter));
        delete adapter;
    }
}

llama_adapter_mem * llama_adapter_mem_init(llama_model * model, void * data, size_t size, char * err, size_t err_size) {
    auto adapter = std::make_unique<llama_adapter_mem>(model);

    try {
        adapter->load(data, size);
    } catch (const std::exception & e) {
        mem_set_error(err, err_size, e.what());
        return nullptr;
    }

    std::lock_guard<std::mutex> lock(mem_mutex);
    model->mems.insert(adapter.get());

    return adapter.release();
}

void llama_adapter_mem_free(llama_adapter_mem * adapter) {
    if (adapter == nullptr) {
        return;
    }
    std::lock_guard<std::mutex> lock(mem_mutex);
    adapter->is_freed = true;
    mem_delete_unused(adapter);
}

void llama_adapter_mem_acquire(const llama_adapter_mem * adapter) {
    std::lock_guard<std::mutex> lock(mem_mutex);
    adapter->n_attached++;
}

void llama_adapter_mem_release(const llama_adapter_mem * adapter) {
    std::lock_guard<std::mutex> lock(mem_mutex);
    adapter->n_attached--;
    mem_delete_unused(adapter);
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

int32_t llama_adapter_mem_set_rows(
        llama_adapter_mem * adapter,
               const char * tensor_name,
                  int64_t   first,
                  int64_t   n,
               const void * data,
                   size_t   size,
                     char * err,
                   size_t   err_size) {
    try {
        adapter->set_rows(tensor_name, first, n, data, size);
    } catch (const std::exception & e) {
        mem_set_error(err, err_size, e.what());
        return -1;
    }
    return 0;
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
    return 0;
}
