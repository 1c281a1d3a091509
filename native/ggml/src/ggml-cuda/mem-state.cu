// GGML_OP_MEM_STATE on CUDA: the launches of its kernels; nothing leaves the device

#include "mem-state.cuh"

#if !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)

#include "mem-state-kernels.cuh"

// size of the buffer for the scores of tokens, in floats
static constexpr int64_t MEM_MAX_SCORES = 16*1024*1024;

static mem_state_args mem_get_args(const ggml_tensor * dst) {
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * state = dst->src[1];
    const ggml_tensor * key   = dst->src[2];
    const ggml_tensor * value = dst->src[4];
    const ggml_tensor * lse   = dst->src[5];
    const ggml_tensor * head  = dst->src[6];

    mem_state_args a = {};

    a.q      = (const char  *) q->data;
    a.state  = state ? (const float *) state->data : nullptr;
    a.dst    = (float       *) dst->data;
    a.key    = (const char  *) key->data;
    a.bias   = (const float *) dst->src[3]->data;
    a.value  = (const char  *) value->data;
    a.lse    = lse ? (const float *) lse->data : nullptr;
    a.offset = (const int32_t *) head->data;

    a.nb_q1      = q->nb[1];
    a.nb_q2      = q->nb[2];
    a.nb_key     = key->nb[1];
    a.nb_value   = value->nb[1];
    a.type_key   = key->type;
    a.type_value = value->type;

    a.kind        = ggml_get_op_params_i32(dst, 0);
    a.scale       = a.kind == GGML_MEM_ANCHOR || a.kind == GGML_MEM_TOKEN ? ggml_get_op_params_f32(dst, 1) : 1.0f;
    a.gain        = ggml_get_op_params_f32(dst, 2);
    a.top_k       = ggml_get_op_params_i32(dst, 3);
    a.min_entries = ggml_get_op_params_i32(dst, 4);
    a.n_probe     = ggml_get_op_params_i32(dst, 5);

    a.d_k       = key->ne[0];
    a.d_v       = value->ne[0];
    a.n_tokens  = q->ne[1];
    a.n_head_kv = head->ne[0] - 1;
    a.n_gqa     = q->ne[2]/a.n_head_kv;

    if (a.n_probe > 0) {
        a.list_key    = (const char    *) dst->src[7]->data;
        a.list_bias   = (const float   *) dst->src[8]->data;
        a.list        = (const int32_t *) dst->src[9]->data;
        a.list_offset = (const int32_t *) ((const char *) head->data + 2*head->nb[1]);
        a.nb_list     = dst->src[7]->nb[1];
        a.type_list   = dst->src[7]->type;
    }

    return a;
}

// calls f with the number of queries of a block
template <typename F>
static void mem_by_queries(const int n_q, F f) {
    if (n_q >= 8) {
        f(std::integral_constant<int, 8>());
    } else if (n_q >= 4) {
        f(std::integral_constant<int, 4>());
    } else if (n_q >= 2) {
        f(std::integral_constant<int, 2>());
    } else {
        f(std::integral_constant<int, 1>());
    }
}

void ggml_cuda_op_mem_state(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    auto launch = [&](auto kernel, const dim3 & grid, const int n_threads, auto... args) {
        ggml_cuda_kernel_launch(kernel, ggml_cuda_kernel_launch_params(grid, dim3(n_threads), 0, ctx.stream()), args...);
    };

    if (ggml_get_op_params_i32(dst, 0) == GGML_MEM_MERGE) {
        launch(mem_merge, dim3(ggml_nrows(dst)), MEM_THREADS,
            (const float *) dst->src[0]->data, (const float *) dst->src[1]->data, (float *) dst->data, int(dst->ne[0] - 1));
        return;
    }

    const mem_state_args a = mem_get_args(dst);
    const dim3 grid_q(a.n_q(), a.n_head_kv);

    if (a.kind == GGML_MEM_TOKEN) {
        // a part of the queries at a time, because their scores take memory
        const int64_t n_row  = dst->src[2]->ne[1];
        const int     n_turn = std::clamp<int64_t>(MEM_MAX_SCORES/(a.n_head_kv*n_row), 1, a.n_q());
        ggml_cuda_pool_alloc<float> scores(ctx.pool(), int64_t(a.n_head_kv)*n_turn*n_row);
        for (int j = 0; j < a.n_q(); j += n_turn) {
            launch(mem_attend_top, dim3(std::min(n_turn, a.n_q() - j), a.n_head_kv), MEM_THREADS, a, j, scores.get(), n_row);
        }
        return;
    }

    if (a.n_probe > 0) {
        launch(mem_probe, grid_q, 2*MEM_THREADS, a);
        return;
    }

    mem_by_queries(a.n_q(), [&](auto nq) {
        // few queries: several blocks share the rows, so that the device is busy
        const int n_block = (a.n_q() + nq - 1)/nq;
        const int n_sm    = ggml_cuda_info().devices[ctx.device].nsm;
        const int n_max   = ggml_get_op_params_i32(dst, 6);
        const int n_share = std::clamp(2*n_sm/(n_block*a.n_head_kv), 1, std::max(1, n_max/MEM_TILE_ROWS));

        const dim3    grid(n_share, n_block, a.n_head_kv);
        const int64_t n_part = int64_t(a.n_head_kv)*a.n_q()*n_share;

        if (a.kind == GGML_MEM_ANCHOR) {
            ggml_cuda_pool_alloc<float> partial(ctx.pool());
            if (n_share > 1) {
                partial.alloc(n_part*(a.d_v + 2));
            }
            launch(mem_attend<nq>, grid, MEM_THREADS, a, partial.get());
            if (n_share > 1) {
                launch(mem_attend_merge, grid_q, MEM_THREADS, a, partial.get(), n_share);
            }
        } else {
            ggml_cuda_pool_alloc<mem_best> partial(ctx.pool());
            if (n_share > 1) {
                partial.alloc(n_part);
            }
            launch(mem_scan<nq>, grid, MEM_THREADS, a, partial.get());
            if (n_share > 1) {
                launch(mem_scan_merge, grid_q, MEM_THREADS, a, partial.get(), n_share);
            }
        }
    });
}

bool ggml_cuda_mem_state_supported(const ggml_tensor * dst) {
    const ggml_mem_kind kind  = (ggml_mem_kind) ggml_get_op_params_i32(dst, 0);
    const ggml_tensor * q     = dst->src[0];
    const ggml_tensor * state = dst->src[1];

    if (state && !ggml_is_contiguous(state)) {
        return false;
    }
    if (kind == GGML_MEM_MERGE) {
        return ggml_is_contiguous(q);
    }

    auto is_table = [](const ggml_tensor * t) {
        return (t->type == GGML_TYPE_F32 || t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_Q8_0) &&
            t->ne[0] % 8 == 0 && t->ne[0] <= MEM_MAX_EMBD && ggml_is_contiguous(t);
    };
    if (!is_table(dst->src[2]) || !is_table(dst->src[4]) || q->nb[0] != sizeof(float)) {
        return false;
    }

    const bool has_lists = ggml_get_op_params_i32(dst, 5) > 0;
    if (kind == GGML_MEM_TOKEN) {
        return !has_lists && dst->src[7] == nullptr && ggml_get_op_params_i32(dst, 3) <= MEM_MAX_TOP_K;
    }
    return has_lists ? is_table(dst->src[7]) : dst->src[7] == nullptr;
}

#else

void ggml_cuda_op_mem_state(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    GGML_UNUSED_VARS(ctx, dst);
    GGML_ABORT("fatal error");
}

bool ggml_cuda_mem_state_supported(const ggml_tensor * dst) {
    GGML_UNUSED(dst);
    return false;
}

#endif // !defined(GGML_USE_HIP) && !defined(GGML_USE_MUSA)
