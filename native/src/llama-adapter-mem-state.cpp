// the attention states of a memory outside of a model's graph, for tests and measurements

#include "llama-adapter-mem.h"

#include "llama-model.h"

#include "ggml-cpu.h"

#include <cstring>

int32_t llama_adapter_mem_state(
        const llama_adapter_mem * adapter,
                        int32_t   il,
                        int32_t   n_tokens,
                    const float * q,
               llama_mem_lookup   lookup,
                          float * state) {
    if (il < 0 || il >= (int32_t) adapter->layers.size() || adapter->layers[il].empty() || !adapter->layers[il].is_host) {
        return -1;
    }

    const auto & hparams = adapter->model->hparams;

    const int64_t n_head   = hparams.n_head(il);
    const int64_t n_embd_k = hparams.n_embd_head_k(il);

    const float gain = 0.0f;
    const llama_adapter_mems mems(&adapter, &gain, 1, lookup);

    const size_t n_nodes = 16 + mems.get_n_nodes();

    ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead()*n_nodes + ggml_graph_overhead_custom(n_nodes, false), nullptr, true }) };
    if (!ctx) {
        return -1;
    }

    ggml_tensor * x   = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, n_embd_k, n_head, n_tokens);
    ggml_tensor * res = mems.build_state_op(ctx.get(), ggml_permute(ctx.get(), x, 0, 2, 1, 3), adapter->kq_scale, il);

    ggml_cgraph * gf = ggml_new_graph_custom(ctx.get(), n_nodes, false);
    ggml_build_forward_expand(gf, res);

    ggml_backend_ptr backend { ggml_backend_cpu_init() };
    ggml_backend_cpu_set_n_threads(backend.get(), 1);
    ggml_backend_buffer_ptr buf { ggml_backend_alloc_ctx_tensors(ctx.get(), backend.get()) };
    if (!buf) {
        return -1;
    }

    ggml_backend_tensor_set(x, q, 0, ggml_nbytes(x));
    ggml_backend_graph_compute(backend.get(), gf);
    ggml_backend_tensor_get(res, state, 0, ggml_nbytes(res));

    return 0;
}
