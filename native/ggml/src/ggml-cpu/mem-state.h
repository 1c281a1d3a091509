#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// bytes of the work buffer that n_tasks threads need
size_t ggml_mem_state_work_size(const struct ggml_tensor * dst, int n_tasks);

void ggml_compute_forward_mem_state(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif
