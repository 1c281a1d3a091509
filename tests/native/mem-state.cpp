// GGML_OP_MEM_STATE and flash attention with a state, against the same sums in double precision
//
//   mem-state cpu|gpu [EVERY]    EVERY: runs only every n-th case
//
// With EMULATED defined `gpu` is the CUDA op, whose kernels then run on the CPU: see cuda-emulation/common.cuh.
// With KERNELS defined `cpu` is the op compiled here, for the instruction sets that the compiler was told, in one thread.
// Prints one line for each group of cases. Returns 1 if a group fails or has no case that the device supports, 77 if the device
// is missing. Outputs hold NaN before the ops write them. tests/test_ops.py runs it.

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

#if defined(EMULATED)
#include "../../native/ggml/src/ggml-cuda/mem-state.cu"
#elif defined(KERNELS)
#include "../../native/ggml/src/ggml-cpu/mem-state.cpp"
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

static constexpr int TOP_K = 5;

static std::mt19937 rng(0);

static ggml_backend_t backend;
static int every = 1;

// all tensors of a case, in the memory of the device
struct test_graph {
    ggml_context          * ctx    = ggml_init({ (size_t) 1 << 20, nullptr, true });
    ggml_cgraph           * gf     = ggml_new_graph(ctx);
    ggml_backend_buffer_t   buffer = nullptr;

    ~test_graph() {
        ggml_backend_buffer_free(buffer);
        ggml_free(ctx);
    }

    // call it before tensors are filled; returns false if the device does not support an op that res needs
    bool alloc(ggml_tensor * res) {
        ggml_build_forward_expand(gf, res);
        for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
            if (!supports(ggml_graph_node(gf, i))) {
                return false;
            }
        }
        buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        return true;
    }

    void compute(int n_threads) {
        for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
            ggml_tensor * node = ggml_graph_node(gf, i);
            if (!node->view_src) {
                ggml_backend_tensor_memset(node, 0xff, 0, ggml_nbytes(node));
            }
        }
        if (ggml_backend_is_cpu(backend)) {
            ggml_backend_cpu_set_n_threads(backend, n_threads);
        }
#if defined(EMULATED)
        for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
            if (ggml_graph_node(gf, i)->op == GGML_OP_MEM_STATE) {
                ggml_backend_cuda_context emulated;
                ggml_cuda_op_mem_state(emulated, ggml_graph_node(gf, i));
            }
        }
#elif defined(KERNELS)
        ggml_threadpool_params threadpool_params = ggml_threadpool_params_default(1);
        ggml_threadpool * threadpool = ggml_threadpool_new(&threadpool_params);
        for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
            ggml_tensor * node = ggml_graph_node(gf, i);
            if (node->op == GGML_OP_MEM_STATE) {
                std::vector<char> work(ggml_mem_state_work_size(node, 1));
                const ggml_compute_params params = { 0, 1, work.size(), work.data(), threadpool, false };
                ggml_compute_forward_mem_state(&params, node);
            }
        }
        ggml_threadpool_free(threadpool);
#else
        GGML_ASSERT(ggml_backend_graph_compute(backend, gf) == GGML_STATUS_SUCCESS);
#endif
    }

    static bool supports(const ggml_tensor * op) {
#if defined(EMULATED)
        return op->op == GGML_OP_MEM_STATE ? ggml_cuda_mem_state_supported(op) : op->op != GGML_OP_FLASH_ATTN_EXT;
#elif defined(KERNELS)
        return op->op != GGML_OP_FLASH_ATTN_EXT;
#else
        return ggml_backend_supports_op(backend, op);
#endif
    }
};

template <typename T>
static void set(ggml_tensor * t, const std::vector<T> & x, size_t first = 0) {
    ggml_backend_tensor_set(t, x.data(), first*sizeof(T), x.size()*sizeof(T));
}

// fills a tensor with normally distributed numbers, in its type
static void fill(ggml_tensor * t, float scale) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> x(ggml_nelements(t));
    for (float & y : x) {
        y = normal(rng);
    }
    std::vector<uint8_t> data(ggml_nbytes(t));
    ggml_quantize_chunk(t->type, x.data(), data.data(), 0, ggml_nrows(t), t->ne[0], nullptr);
    if (t->type == GGML_TYPE_Q8_0) {
        // a scale, F16 before 32 bytes, may be negative
        for (size_t i = 0; i < data.size(); i += 3*34) {
            data[i + 1] ^= 0x80;
            for (size_t l = i + 2; l < i + 34; l++) {
                data[l] = -data[l];
            }
        }
    }
    set(t, data);
}

static std::vector<float> values(const ggml_tensor * t) {
    std::vector<uint8_t> data(ggml_nbytes(t));
    ggml_backend_tensor_get(t, data.data(), 0, data.size());
    std::vector<float> x(ggml_nelements(t));
    if (t->type == GGML_TYPE_F32) {
        memcpy(x.data(), data.data(), data.size());
    } else {
        ggml_get_type_traits(t->type)->to_float(data.data(), x.data(), x.size());
    }
    return x;
}

// fills states [d_v + 1, n_head, n_tokens]; from first on, every period-th one is that of no tokens
static void fill_state(ggml_tensor * t, float scale, int64_t first, int64_t period) {
    fill(t, scale);
    for (int64_t i = first; i < t->ne[1]*t->ne[2]; i += period) {
        set<float>(t, { -INFINITY }, (i + 1)*t->ne[0] - 1);
    }
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

// n is a multiple of 8; eight sums side by side are much faster than one
static double dot(const float * a, const float * b, int64_t n) {
    double s[8] = {};
    for (int64_t i = 0; i < n; i += 8) {
        for (int j = 0; j < 8; j++) {
            s[j] += (double) a[i + j]*b[i + j];
        }
    }
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

struct shape {
    int64_t d_k, d_v, n_head_kv, n_gqa, n_tokens;
    int n_threads;

    int64_t n_head() const { return n_head_kv*n_gqa; }

    std::string name() const {
        return "d " + std::to_string(d_k) + "/" + std::to_string(d_v) + ", " + std::to_string(n_head_kv) + "x" + std::to_string(n_gqa) +
            " heads, " + std::to_string(n_tokens) + " tokens";
    }
};

// cases reported in one line
struct group {
    std::string name;
    double bound;
    double near = 0; // share of the queries that may take the other of two entries with nearly the same score
    std::vector<double> errors = {};
    int n_seen  = 0;
    int n_cases = 0;

    explicit group(const std::string & name, double bound, double near = 0) : name(name), bound(bound), near(near) {}

    // returns false if the case is left out, or the device does not support it
    bool begin(test_graph & graph, ggml_tensor * res, const shape & p) {
        if (n_seen++ % every != 0) {
            return false;
        }
        if (!graph.alloc(res)) {
            printf("%s, %s: not supported\n", name.c_str(), p.name().c_str());
            return false;
        }
        n_cases++;
        return true;
    }

    bool report() {
        std::sort(errors.begin(), errors.end());
        const double error = errors.empty() ? INFINITY : errors[(size_t) ((errors.size() - 1)*(1.0 - near))];
        const bool   ok    = error <= bound;
        printf("%s: %d cases, error %.2g, bound %.2g: %s\n", name.c_str(), n_cases, error, bound, ok ? "ok" : "FAILED");
        return ok;
    }
};

// checks all queries of one case; the tables have random sizes, and some are empty
// n_probe: number of lists that are searched, 0 for a scan
static void mem_state_case(group & g, const shape & p, ggml_type type, ggml_mem_kind kind, bool with_state, float gain, int n_probe = 0) {
    test_graph graph;
    ggml_context * ctx = graph.ctx;

    const int64_t n_head = p.n_head();
    std::vector<int32_t> offset = { 0 };
    for (int64_t h = 0; h < p.n_head_kv; h++) {
        offset.push_back(offset.back() + (h % 4 == 3 ? 0 : 1 + rng() % 150));
    }
    const int64_t n = offset.back();

    ggml_tensor * q_0   = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_k, n_head, p.n_tokens);
    ggml_tensor * q     = ggml_permute(ctx, q_0, 0, 2, 1, 3);
    ggml_tensor * state = with_state ? ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_v + 1, n_head, p.n_tokens) : nullptr;

    ggml_mem_table table = {};
    table.kind  = kind;
    table.top_k = TOP_K;
    table.n_max = 150;
    table.key   = ggml_new_tensor_2d(ctx, type, p.d_k, n);
    table.value = ggml_new_tensor_2d(ctx, type, p.d_v, n);
    table.bias  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n);
    table.head  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, p.n_head_kv + 1, 3);

    std::vector<int32_t> list = { 0 };
    std::vector<int32_t> list_offset = { 0 };
    for (int64_t h = 0; h < p.n_head_kv; h++) {
        while (list.back() < offset[h + 1]) {
            list.push_back(std::min<int32_t>(offset[h + 1], list.back() + 1 + rng() % 20));
        }
        list_offset.push_back(list.size() - 1);
    }
    if (n_probe > 0) {
        table.n_probe     = n_probe;
        table.min_entries = 30;
        table.list_key    = ggml_new_tensor_2d(ctx, type, p.d_k, list.size() - 1);
        table.list_bias   = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, list.size() - 1);
        table.list        = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, list.size());
    }
    if (kind == GGML_MEM_CENTROID || kind == GGML_MEM_RESIDUAL) {
        table.lse = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n);
    }

    const float scale = 1.0f/sqrtf(p.d_k);
    ggml_tensor * res = ggml_mem_state(ctx, q, state, &table, scale, gain);
    if (!g.begin(graph, res, p)) {
        return;
    }

    fill(q_0, 1.0f);
    fill(table.key, 1.0f);
    fill(table.value, 1.0f);
    fill(table.bias, 2.0f);
    if (table.lse) {
        fill(table.lse, 2.0f);
    }
    std::vector<int32_t> head = offset;
    head.resize(2*offset.size());
    head.insert(head.end(), list_offset.begin(), list_offset.end());
    set(table.head, head);
    if (n_probe > 0) {
        fill(table.list_key, 1.0f);
        fill(table.list_bias, 2.0f);
        set(table.list, list);
    }
    if (state) {
        fill_state(state, 2.0f, 0, p.n_tokens*n_head);
    }

    graph.compute(p.n_threads);

    const auto k = values(table.key), v = values(table.value), b = values(table.bias), x_q = values(q_0), got = values(res);
    const auto l = table.lse ? values(table.lse) : std::vector<float>();
    const auto s_in = state ? values(state) : std::vector<float>();
    const auto k_list = n_probe ? values(table.list_key)  : std::vector<float>();
    const auto b_list = n_probe ? values(table.list_bias) : std::vector<float>();

    // whether an entry is in one of the lists that a query of the KV head h searches
    auto searched = [&](int64_t h, const float * x) {
        std::vector<bool> res(n, n_probe == 0 || offset[h + 1] - offset[h] < table.min_entries);
        std::vector<std::pair<double, int64_t>> scores;
        for (int64_t c = list_offset[h]; n_probe > 0 && c < list_offset[h + 1]; c++) {
            scores.push_back({ dot(&k_list[c*p.d_k], x, p.d_k) + b_list[c], c });
        }
        std::sort(scores.rbegin(), scores.rend());
        for (size_t c = 0; c < std::min<size_t>(n_probe, scores.size()); c++) {
            std::fill(res.begin() + list[scores[c].second], res.begin() + list[scores[c].second + 1], true);
        }
        return res;
    };

    for (int64_t i = 0; i < p.n_tokens*n_head; i++) {
        const int64_t h  = i % n_head/p.n_gqa;
        const float * x  = &x_q[i*p.d_k];
        const float * in = state ? &s_in[i*(p.d_v + 1)] : nullptr;

        std::vector<std::pair<double, int64_t>> scores;
        const auto in_list = searched(h, x);
        for (int64_t r = offset[h]; r < offset[h + 1]; r++) {
            if (in_list[r]) {
                scores.push_back({ (kind == GGML_MEM_TOKEN || kind == GGML_MEM_ANCHOR ? scale : 1.0)*dot(&k[r*p.d_k], x, p.d_k) + b[r], r });
            }
        }
        if (kind != GGML_MEM_ANCHOR) {
            std::sort(scores.rbegin(), scores.rend());
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
        g.errors.push_back(expected.error(&got[i*(p.d_v + 1)], true));
    }
}

// merges two states, of which one or both may be those of no tokens
static void merge_case(group & g, const shape & p) {
    test_graph graph;

    ggml_tensor * a   = ggml_new_tensor_3d(graph.ctx, GGML_TYPE_F32, p.d_v + 1, p.n_head(), p.n_tokens);
    ggml_tensor * b   = ggml_dup_tensor(graph.ctx, a);
    ggml_tensor * res = ggml_mem_state_merge(graph.ctx, a, b);
    if (!g.begin(graph, res, p)) {
        return;
    }

    fill_state(a, 3.0f, 0, 2);
    fill_state(b, 3.0f, 0, 3);

    graph.compute(p.n_threads);

    const auto x_a = values(a), x_b = values(b), got = values(res);
    for (int64_t i = 0; i < ggml_nrows(res); i++) {
        const int64_t row = i*(p.d_v + 1);
        sums expected(p.d_v);
        expected.add(x_a[row + p.d_v], &x_a[row]);
        expected.add(x_b[row + p.d_v], &x_b[row]);
        g.errors.push_back(expected.error(&got[row], true));
    }
}

// flash attention with several states
[[maybe_unused]] static void flash_case(group & g, const shape & p, ggml_type type, int64_t n_kv, int n_states, bool nothing_live) {
    test_graph graph;
    ggml_context * ctx = graph.ctx;

    const int64_t n_head = p.n_head();

    ggml_tensor * q    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_k, p.n_tokens, n_head);
    ggml_tensor * k    = ggml_new_tensor_3d(ctx, type, p.d_k, n_kv, p.n_head_kv);
    ggml_tensor * v    = ggml_new_tensor_3d(ctx, type, p.d_v, n_kv, p.n_head_kv);
    ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, p.n_tokens);

    std::vector<ggml_tensor *> states;
    ggml_tensor * state = nullptr;
    for (int i = 0; i < n_states; i++) {
        states.push_back(ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.d_v + 1, n_head, p.n_tokens));
        state = state ? ggml_mem_state_merge(ctx, state, states[i]) : states[i];
    }

    const float scale = 1.0f/sqrtf(p.d_k);
    ggml_tensor * res = ggml_flash_attn_ext(ctx, q, k, v, mask, scale, 0.0f, 0.0f);
    ggml_flash_attn_ext_add_state(res, state);
    ggml_prec_set_acc(res, GGML_PREC_F32);
    if (!g.begin(graph, res, p)) {
        return;
    }

    fill(q, 1.0f);
    fill(k, 1.0f);
    fill(v, 1.0f);
    for (ggml_tensor * s : states) {
        fill_state(s, 3.0f, 0, p.n_tokens*n_head);
    }

    auto seen = [&](int64_t t, int64_t i) { return !nothing_live && i < n_kv - p.n_tokens + t + 1; };
    std::vector<ggml_fp16_t> hidden(n_kv*p.n_tokens);
    for (int64_t t = 0; t < p.n_tokens; t++) {
        for (int64_t i = 0; i < n_kv; i++) {
            hidden[t*n_kv + i] = ggml_fp32_to_fp16(seen(t, i) ? 0.0f : -INFINITY);
        }
    }
    set(mask, hidden);

    graph.compute(p.n_threads);

    const auto x_q = values(q), x_k = values(k), x_v = values(v), got = values(res);
    std::vector<std::vector<float>> x_s;
    for (ggml_tensor * s : states) {
        x_s.push_back(values(s));
    }

    for (int64_t t = 0; t < p.n_tokens; t++) {
        for (int64_t hq = 0; hq < n_head; hq++) {
            const int64_t h = hq/p.n_gqa;
            const float * x = &x_q[(hq*p.n_tokens + t)*p.d_k];

            sums expected(p.d_v);
            for (const auto & s : x_s) {
                const float * in = &s[(t*n_head + hq)*(p.d_v + 1)];
                expected.add(in[p.d_v], in);
            }
            for (int64_t i = 0; i < n_kv && seen(t, i); i++) {
                expected.add(scale*dot(&x_k[(h*n_kv + i)*p.d_k], x, p.d_k), &x_v[(h*n_kv + i)*p.d_v]);
            }
            if (expected.sum == 0 && !ggml_backend_is_cpu(backend)) {
                continue; // 0/0, as without a state; a token that is decoded sees itself
            }
            g.errors.push_back(expected.error(&got[(t*n_head + hq)*p.d_v], false));
        }
    }
}

int main(int argc, char ** argv) {
    const std::string device = argc > 1 ? argv[1] : "";
    if (argc > 2) {
        every = atoi(argv[2]);
    }
    if ((device != "cpu" && device != "gpu") || argc > 3 || every < 1) {
        fprintf(stderr, "usage: %s cpu|gpu [every]\n", argv[0]);
        return 2;
    }
#if defined(EMULATED)
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
#else
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(device == "cpu" ? GGML_BACKEND_DEVICE_TYPE_CPU : GGML_BACKEND_DEVICE_TYPE_GPU);
#endif
    if (!dev) {
        printf("the runtime has no %s\n", device.c_str());
        return 77;
    }
    backend = ggml_backend_dev_init(dev, nullptr);
    printf("%s: %s\n", ggml_backend_dev_name(dev), ggml_backend_dev_description(dev));

    const char * kinds[] = { "centroid", "tangent", "residual", "token", "anchor" };
    bool ok = true;

    for (ggml_type type : { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0 }) {
        const std::string type_name = ggml_type_name(type);
        const int64_t block = ggml_blck_size(type);

        for (int i = GGML_MEM_CENTROID; i <= GGML_MEM_ANCHOR; i++) {
            const auto kind = (ggml_mem_kind) i;
            group g(kinds[i] + (" " + type_name), 5e-5, kind == GGML_MEM_ANCHOR ? 0.0 : 0.005);

            auto both = [&](int64_t d_k, int64_t d_v, int64_t n_gqa, int64_t n_tokens) {
                if (kind != GGML_MEM_RESIDUAL) {
                    mem_state_case(g, { d_k, d_v, 4, n_gqa, n_tokens, 1 }, type, kind, false, 0.7f);
                }
                mem_state_case(g, { d_k, d_v, 4, n_gqa, n_tokens, 3 }, type, kind, true, 0.0f);
            };
            for (const auto & [d_k, d_v] : { std::pair(64, 64), std::pair(80, 80), std::pair(96, 96), std::pair(128, 128), std::pair(256, 256),
                    std::pair(128, 96), std::pair(96, 256) }) {
                if (d_k % block != 0 || d_v % block != 0) {
                    continue;
                }
                for (int n_gqa : { 1, 3, 8 }) {
                    both(d_k, d_v, n_gqa, 1);
                    both(d_k, d_v, n_gqa, 5);
                }
                both(d_k, d_v, 3, 70);
            }
            for (int n_gqa : { 2, 4, 5, 6, 7 }) {
                both(64, 64, n_gqa, 2);
            }
            both(64, 64, 8, 130);
            both(128, 128, 4, 512);
            ok &= g.report();
        }

        for (ggml_mem_kind kind : { GGML_MEM_CENTROID, GGML_MEM_TANGENT, GGML_MEM_RESIDUAL }) {
            group g(kinds[kind] + (" in lists " + type_name), 5e-5, 0.005);
            for (int d : { 64, 128, 256 }) {
                for (int n_tokens : { 1, 5, 70 }) {
                    for (int n_probe : { 1, 3, 50 }) {
                        mem_state_case(g, { d, d, 4, 3, n_tokens, 2 }, type, kind, true, 0.0f, n_probe);
                    }
                }
            }
            ok &= g.report();
        }

#if !defined(EMULATED) && !defined(KERNELS)
        group g("flash attention " + type_name, 2e-2); // it rounds q, and on the CPU adds up F16 values in F16
        for (int d : { 64, 80, 96, 128, 256 }) {
            if (d % block != 0) {
                continue;
            }
            for (int n_gqa : { 1, 2, 3, 4, 8 }) {
                for (int n_tokens : { 1, 7 }) {
                    flash_case(g, { d, d, 2, n_gqa, n_tokens, 2 }, type, 256, 1, false);
                }
            }
        }
        for (int n_tokens : { 1, 5, 33, 130 }) {
            for (int n_kv : { 256, 512 }) {
                for (int n_threads : { 1, 3 }) {
                    flash_case(g, { 64, 64, 3, 3, n_tokens, n_threads }, type, n_kv, 1, false);
                }
            }
        }
        for (int n_gqa : { 1, 4 }) {
            flash_case(g, { 128, 128, 1, n_gqa, 512, 2 }, type, 1024, 1, false);
        }
        for (int d : { 64, 128 }) {
            for (int n_tokens : { 1, 33 }) {
                flash_case(g, { d, d, 2, 4, n_tokens, 2 }, type, 512, 3, false);
                flash_case(g, { d, d, 2, 4, n_tokens, 2 }, type, 256, 2, true);
            }
        }
        ok &= g.report();
#endif
    }

    group merge("merge", 1e-5);
    for (int d : { 64, 80, 96, 128, 256 }) {
        for (int n_tokens : { 1, 70, 512 }) {
            merge_case(merge, { d, d, 2, 3, n_tokens, 2 });
        }
    }
    ok &= merge.report();

    group off("a gain of -inf", 1e-6);
    for (ggml_mem_kind kind : { GGML_MEM_CENTROID, GGML_MEM_TANGENT, GGML_MEM_TOKEN, GGML_MEM_ANCHOR }) {
        mem_state_case(off, { 64, 64, 4, 3, 2, 2 }, GGML_TYPE_F16, kind, true, -INFINITY);
    }
    ok &= off.report();

    ggml_backend_free(backend);
    return ok ? 0 : 1;
}
