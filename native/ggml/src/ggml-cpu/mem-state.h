#pragma once

#include "ggml.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// bytes of the work buffer for n_tasks threads
size_t ggml_mem_state_work_size(const struct ggml_tensor * dst, int n_tasks);

void ggml_compute_forward_mem_state(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// entries and lists that lookups in the calling thread have scored since it began
int64_t ggml_backend_cpu_mem_state_n_scored(void);

#ifdef __cplusplus
}
#endif
