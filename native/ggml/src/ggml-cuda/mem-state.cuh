#include "common.cuh"

void ggml_cuda_op_mem_state(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

bool ggml_cuda_mem_state_supported(const ggml_tensor * dst);
