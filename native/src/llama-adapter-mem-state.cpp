// the attention states of a memory outside of a model's graph, see llama-ext.h

#include "llama-ext.h"

#include "llama-adapter-mem.h"
#include "llama-model.h"

int32_t llama_adapter_mem_state(
        const llama_adapter_mem * adapter,
                        int32_t   il,
                        int32_t   n_tokens,
                    const float * q,
               llama_mem_lookup   lookup,
                          float * state,
                        int64_t * n_scored) {
    if (il < 0 || il >= (int32_t) adapter->layers.size() || adapter->layers[il].empty() || !adapter->layers[il].is_host) {
        return -1;
    }

    const auto & hparams = adapter->model->hparams;

    const float gain = 0.0f;
    const llama_adapter_mems mems(&adapter, &gain, 1, lookup);

    const size_t n_nodes = 2 + 2*mems.n_tables(il);

    ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*n_nodes + ggml_graph_overhead_custom(16*n_nodes, false), nullptr, true }) };
    if (!ctx) {
        return -1;
    }

    ggml_tensor * x   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, hparams.n_embd_head_k(il), hparams.n_head(il), n_tokens);
    ggml_tensor * res = mems.build_state_op(ctx.get(), ggml_permute(ctx.get(), x, 0, 2, 1, 3), adapter->kq_scale, il);

    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), 16*n_nodes, false); // with room for the tensors of the tables
    ggml_build_forward_expand(gf, res);

    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(dev);

    // one thread is the calling one, which has a counter of its own
    auto * set_n_threads  = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    auto * count_n_scored = (int64_t (*)(void)) ggml_backend_reg_get_proc_address(reg, "ggml_backend_cpu_mem_state_n_scored");

    ggml_backend_ptr backend { ggml_backend_dev_init(dev, nullptr) };
    set_n_threads(backend.get(), 1);
    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
    if (!buf) {
        return -1;
    }

    ggml_backend_tensor_set(x, q, 0, ggml_nbytes(x));
    const int64_t n_scored_before = count_n_scored();
    ggml_backend_graph_compute(backend.get(), gf);
    if (n_scored) {
        *n_scored = count_n_scored() - n_scored_before;
    }
    ggml_backend_tensor_get(res, state, 0, ggml_nbytes(res));

    return 0;
}
