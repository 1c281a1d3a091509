// Vectors of floats on ARM, see mem-vec.h
#pragma once

#if defined(__ARM_FEATURE_SVE)
using mem_vec_ops = mem_vec_generic;
#else
struct mem_vec_ops : mem_vec_generic {
    static mem_vec load_f16(const ggml_fp16_t * x) { return vcvt_f32_f16(vld1_f16((const __fp16 *) x)); }
};
#endif
