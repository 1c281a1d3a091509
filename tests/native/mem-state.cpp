// GGML_OP_MEM_STATE and flash attention with a state, on the CPU, against the same sums in double precision
//
// Prints one line for each group of cases and returns 1 if one of them fails. Outputs hold NaN before the op writes them.
// Driven by tests/test_ops.py

#include "ggml.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

static constexpr int TOP_K = 5;

static std::mt19937 rng(0);

static void fill(ggml_tensor * t, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> x(ggml_nelements(t));
    for (float & y : x) {
        y = normal(rng);
    }
    if (t->type == GGML_TYPE_F32) {
        memcpy(t->data, x.data(), ggml_nbytes(t));
    } else {
        ggml_get_type_traits_cpu(t->type)->from_float(x.data(), t->data, x.size());
    }
}

static std::vector<float> values(const ggml_tensor * t) {
    std::vector<float> x(ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        memcpy(x.data(), t->data, ggml_nbytes(t));
    } else {
        ggml_get_type_traits(t->type)->to_float(t->data, x.data(), x.size());
    }
    return x;
}

static void compute(ggml_context * ctx, ggml_tensor * res, int n_threads) {
    ggml_cgraph * gf = ggml_new_graph(ctx);
    ggml_build_forward_expand(gf, res);
    memset(res->data, 0xff, ggml_nbytes(res));
    ggml_graph_compute_with_ctx(ctx, gf, n_threads);
}

static ggml_context * new_context() {
    return ggml_init({ (size_t) 1 << 29, nullptr, false });
}

// the state of terms: o = sum_i exp(s_i) v_i / sum_i exp(s_i), and the log of that sum
struct sums {
    std::vector<double> o;
    double max = -INFINITY;
    double sum = 0;

    explicit sums(int64_t d) : o(d) {}

    void add(double s, const float * v) {
        if (s == -INFINITY) {
            return;
        }
        if (s > max) {
            const double c = exp(max - s);
            for (double & x : o) {
                x *= c;
            }
            sum *= c;
            max  = s;
        }
        const double w = exp(s - max);
        for (size_t i = 0; i < o.size(); i++) {
            o[i] += w*v[i];
        }
        sum += w;
    }

    // the largest difference to got [d] or, with the log-sum-exp, [d + 1]; infinite if got has a NaN
    double error(const float * got, bool with_lse) const {
        double worst = 0;
        auto see = [&](double a, double b) {
            if (a != b) {
                worst = std::max(worst, std::isnan(b) ? INFINITY : std::fabs(a - b));
            }
        };
        for (size_t i = 0; i < o.size(); i++) {
            see(sum > 0 ? o[i]/sum : 0.0, got[i]);
        }
        if (with_lse) {
            see(sum > 0 ? max + log(sum) : -INFINITY, got[o.size()]);
        }
        return worst;
    }
};

static double dot(const float * a, const float * b, int64_t n) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) {
        s += (double) a[i]*b[i];
    }
    return s;
}

struct shape {
    int64_t d_k, d_v, n_head_kv, n_gqa, n_tokens;
    int n_threads;
};

// errors of all queries for tables of random size, some of them empty
static std::vector<double> mem_state_errors(const shape & p, ggml_type type, ggml_mem_kind kind, bool with_state, float gain) {
    ggml_context * ctx = new_context();

    const int64_t n_head = p.n_head_kv*p.n_gqa;
    std::vector<int32_t> offset = { 0 };
    for (int64_t h = 0; h < p.n_head_kv; h++) {
        offset.push_back(offset.back() + (h % 4 == 3 ? 0 : 1 + rng() % 150));
    }
    const int64_t n = offset.back();

    ggml_tensor * q_0   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_k, n_head, p.n_tokens);
    ggml_tensor * q     = ggml_permute(ctx, q_0, 0, 2, 1, 3);
    ggml_tensor * key   = ggml_new_tensor_2d(ctx, type, p.d_k, n);
    ggml_tensor * value = ggml_new_tensor_2d(ctx, type, p.d_v, n);
    ggml_tensor * bias  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n);
    ggml_tensor * lse   = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n);
    ggml_tensor * head  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, p.n_head_kv + 1, 2);
    ggml_tensor * state = with_state ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_v + 1, n_head, p.n_tokens) : nullptr;

    fill(q_0, 1.0f);
    fill(key, 1.0f);
    fill(value, 1.0f);
    fill(bias, 2.0f);
    fill(lse, 2.0f);
    memset(head->data, 0, ggml_nbytes(head));
    memcpy(head->data, offset.data(), offset.size()*sizeof(int32_t));
    if (state) {
        fill(state, 2.0f);
        ((float *) state->data)[p.d_v] = -INFINITY;
    }

    const float scale   = 1.0f/sqrtf(p.d_k);
    const bool  has_lse = kind == GGML_MEM_CENTROID || kind == GGML_MEM_RESIDUAL;
    const ggml_mem_table table = { kind, key, bias, value, has_lse ? lse : nullptr, head, nullptr, nullptr, nullptr, TOP_K, 0 };

    ggml_tensor * res = ggml_mem_state(ctx, q, state, &table, scale, gain);
    compute(ctx, res, p.n_threads);

    const std::vector<float> k = values(key), v = values(value), b = values(bias), l = values(lse);
    std::vector<double> errors;

    for (int64_t i = 0; i < p.n_tokens*n_head; i++) {
        const int64_t h  = i % n_head/p.n_gqa;
        const float * x  = (const float *) q_0->data + i*p.d_k;
        const float * in = state ? (const float *) state->data + i*(p.d_v + 1) : nullptr;

        std::vector<std::pair<double, int64_t>> scores;
        for (int64_t r = offset[h]; r < offset[h + 1]; r++) {
            scores.push_back({ (kind == GGML_MEM_TOKEN || kind == GGML_MEM_ANCHOR ? scale : 1.0)*dot(&k[r*p.d_k], x, p.d_k) + b[r], r });
        }
        std::sort(scores.rbegin(), scores.rend());
        if (kind != GGML_MEM_ANCHOR) {
            scores.resize(std::min<size_t>(scores.size(), kind == GGML_MEM_TOKEN ? TOP_K : 1));
        }

        sums expected(p.d_v);
        if (kind == GGML_MEM_RESIDUAL) {
            std::vector<float> o(in, in + p.d_v);
            double s = in[p.d_v] + gain;
            for (const auto & [unused, r] : scores) {
                for (int64_t c = 0; c < p.d_v; c++) {
                    o[c] += v[r*p.d_v + c];
                }
                s += l[r];
            }
            expected.add(s, o.data());
            if (s == -INFINITY) {
                continue; // nothing to correct
            }
        } else {
            for (const auto & [s, r] : scores) {
                expected.add((kind == GGML_MEM_CENTROID ? l[r] : s) + gain, &v[r*p.d_v]);
            }
            if (in) {
                expected.add(in[p.d_v], in);
            }
        }
        errors.push_back(expected.error((const float *) res->data + i*(p.d_v + 1), true));
    }

    ggml_free(ctx);
    return errors;
}

static double flash_error(const shape & p, ggml_type type, int64_t n_kv, bool nothing_live) {
    ggml_context * ctx = new_context();

    const int64_t n_head = p.n_head_kv*p.n_gqa;

    ggml_tensor * q     = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_k, p.n_tokens, n_head);
    ggml_tensor * k     = ggml_new_tensor_3d(ctx, type, p.d_k, n_kv, p.n_head_kv);
    ggml_tensor * v     = ggml_new_tensor_3d(ctx, type, p.d_v, n_kv, p.n_head_kv);
    ggml_tensor * mask  = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, p.n_tokens);
    ggml_tensor * state = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_v + 1, n_head, p.n_tokens);

    fill(q, 1.0f);
    fill(k, 1.0f);
    fill(v, 1.0f);
    fill(state, 3.0f);
    ((float *) state->data)[p.d_v] = -INFINITY;

    auto seen = [&](int64_t t, int64_t i) { return !nothing_live && i < n_kv - p.n_tokens + t + 1; };
    for (int64_t t = 0; t < p.n_tokens; t++) {
        for (int64_t i = 0; i < n_kv; i++) {
            ((ggml_fp16_t *) mask->data)[t*n_kv + i] = ggml_fp32_to_fp16(seen(t, i) ? 0.0f : -INFINITY);
        }
    }

    const float scale = 1.0f/sqrtf(p.d_k);
    ggml_tensor * res = ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0.0f, 0.0f);
    ggml_flash_attn_ext_add_state(res, state);
    compute(ctx, res, p.n_threads);

    const std::vector<float> k_f = values(k), v_f = values(v);
    double worst = 0;

    for (int64_t t = 0; t < p.n_tokens; t++) {
        for (int64_t hq = 0; hq < n_head; hq++) {
            const int64_t h  = hq/p.n_gqa;
            const float * x  = (const float *) q->data + (hq*p.n_tokens + t)*p.d_k;
            const float * in = (const float *) state->data + (t*n_head + hq)*(p.d_v + 1);

            sums expected(p.d_v);
            expected.add(in[p.d_v], in);
            for (int64_t i = 0; i < n_kv; i++) {
                if (seen(t, i)) {
                    expected.add(scale*dot(&k_f[(h*n_kv + i)*p.d_k], x, p.d_k), &v_f[(h*n_kv + i)*p.d_v]);
                }
            }
            worst = std::max(worst, expected.error((const float *) res->data + (t*n_head + hq)*p.d_v, false));
        }
    }

    ggml_free(ctx);
    return worst;
}

// the largest error once the few queries are left out that find another of two entries with nearly the same score
static double worst_but(std::vector<double> errors, double share) {
    std::sort(errors.begin(), errors.end());
    return errors[(size_t) ((errors.size() - 1)*(1.0 - share))];
}

static bool report(const char * what, const char * type, double error, double bound) {
    const bool ok = error <= bound;
    printf("%s %s: error %.2g, bound %.2g: %s\n", what, type, error, bound, ok ? "ok" : "FAILED");
    return ok;
}

int main() {
    ggml_cpu_init();

    const char * kinds[] = { "centroid", "tangent", "residual", "token", "anchor" };
    bool ok = true;

    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        for (int kind = GGML_MEM_CENTROID; kind <= GGML_MEM_ANCHOR; kind++) {
            std::vector<double> errors;
            for (const auto & [d_k, d_v] : { std::pair(64, 64), std::pair(128, 96), std::pair(80, 80), std::pair(96, 256) }) {
                if (type == GGML_TYPE_Q8_0 && d_k % 32 != 0) {
                    continue;
                }
                for (int n_tokens : { 1, 5, 70 }) {
                    for (int n_gqa : { 1, 3, 8 }) {
                        for (bool with_state : { false, true }) {
                            if (kind == GGML_MEM_RESIDUAL && !with_state) {
                                continue;
                            }
                            const auto found = mem_state_errors({ d_k, d_v, 4, n_gqa, n_tokens, with_state ? 3 : 1 },
                                type, (ggml_mem_kind) kind, with_state, with_state ? 0.0f : 0.7f);
                            errors.insert(errors.end(), found.begin(), found.end());
                        }
                    }
                }
            }
            ok &= report(kinds[kind], ggml_type_name(type), worst_but(errors, kind == GGML_MEM_ANCHOR ? 0.0 : 0.005), 5e-5);
        }

        double worst = 0;
        for (int n_tokens : { 1, 5, 130 }) {
            for (int n_kv : { 256, 512 }) {
                for (int n_threads : { 1, 3 }) {
                    worst = std::max(worst, flash_error({ 64, 64, 3, 3, n_tokens, n_threads }, type, n_kv, false));
                }
            }
        }
        for (int d : { 96, 128, 256 }) {
            worst = std::max(worst, flash_error({ d, d, 2, 8, 7, 2 }, type, 256, false));
        }
        worst = std::max(worst, flash_error({ 64, 64, 3, 3, 1, 2 }, type, 256, true));
        // flash attention rounds q, and adds up F16 values in F16
        ok &= report("flash attention", ggml_type_name(type), worst, 2e-2);
    }

    std::vector<double> off = mem_state_errors({ 64, 64, 3, 3, 2, 2 }, GGML_TYPE_F16, GGML_MEM_ANCHOR, true, -INFINITY);
    ok &= report("a gain of -inf", "f16", worst_but(off, 0.0), 1e-6);

    return ok ? 0 : 1;
}
