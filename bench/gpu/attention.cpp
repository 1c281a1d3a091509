// The attention part of a layer, by itself: flash attention over a prefix, or the state of a memory and flash attention with it
//
//   attention cpu|gpu copy
//   attention cpu|gpu prefix|memory N BATCH N_LAYER N_HEAD N_HEAD_KV D
//
// N: tokens of the prefix, or entries of the memory per KV head; N_LIVE live tokens come after it. BATCH: tokens in one step.
// Prints µs per layer, or for `copy` the GB/s that a copy on the device reads and writes. The layers, each with tables of its
// own, are one graph; it is run for about a second and waited for once, so that no launch is counted. Driven by bench/gpu/attention.py

#include "ggml.h"
#include "ggml-alloc.h"
#include "ggml-backend.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

static constexpr int64_t N_LIVE      = 256;
static constexpr int64_t MIN_ENTRIES = 2048; // smaller tables are scanned, as MEM_SEARCH_MIN_ENTRIES in llama-adapter-mem-graph.cpp
static int n_probe(int64_t n) { return n <= 16384 ? 12 : 16; } // as mem_n_probe there

static ggml_backend_t backend;

// random numbers, the same every MiB or so
static void fill(ggml_tensor * t) {
    static const std::vector<float> x = [] {
        std::mt19937 rng(0);
        std::normal_distribution<float> normal;
        std::vector<float> x(1 << 19);
        for (float & y : x) {
            y = normal(rng);
        }
        return x;
    }();
    std::vector<uint8_t> data(ggml_row_size(t->type, x.size()));
    ggml_quantize_chunk(t->type, x.data(), data.data(), 0, 1, x.size(), nullptr);
    for (size_t at = 0; at < ggml_nbytes(t); at += data.size()) {
        ggml_backend_tensor_set(t, data.data(), at, std::min(data.size(), ggml_nbytes(t) - at));
    }
}

struct bench {
    ggml_context * ctx = ggml_init({ (size_t) 1 << 24, nullptr, true });
    ggml_cgraph  * gf  = ggml_new_graph(ctx);

    std::vector<ggml_tensor *> random, heads, lists;
    int64_t n, n_batch, n_head, n_head_kv, d;

    // of a head
    int64_t n_list() const { return llround(2*sqrt(n)); }

    ggml_tensor * table(ggml_type type, std::vector<int64_t> ne) {
        random.push_back(ggml_new_tensor(ctx, type, ne.size(), ne.data()));
        return random.back();
    }

    ggml_tensor * queries(int64_t n_heads, int64_t n_tokens, ggml_type type) {
        return ggml_permute(ctx, table(type, { d, n_heads, n_tokens }), 0, 2, 1, 3);
    }

    // as lookup_table in bench/common/shapes.py
    ggml_tensor * memory(ggml_tensor * q) {
        ggml_mem_table t = {};
        t.kind  = GGML_MEM_CENTROID;
        t.n_max = n;
        t.key   = table(GGML_TYPE_F16, { d, n*n_head_kv });
        t.value = table(GGML_TYPE_F16, { d, n*n_head_kv });
        t.bias  = table(GGML_TYPE_F32, { n*n_head_kv });
        t.lse   = table(GGML_TYPE_F32, { n*n_head_kv });
        t.head  = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_head_kv + 1, 3);
        heads.push_back(t.head);
        if (n >= MIN_ENTRIES) {
            t.list_key  = table(GGML_TYPE_F16, { d, n_list()*n_head_kv });
            t.list_bias = table(GGML_TYPE_F32, { n_list()*n_head_kv });
            t.list      = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_list()*n_head_kv + 1);
            t.n_probe   = n_probe(n);
            lists.push_back(t.list);
        }
        return ggml_mem_state(ctx, q, nullptr, &t, 1.0f/sqrtf(d), 0.0f);
    }

    void add_layer(bool is_memory) {
        const int64_t n_kv = N_LIVE + (is_memory ? 0 : n);

        ggml_tensor * q    = queries(n_head, n_batch, GGML_TYPE_F32);
        ggml_tensor * k    = queries(n_head_kv, n_kv, GGML_TYPE_F16);
        ggml_tensor * v    = queries(n_head_kv, n_kv, GGML_TYPE_F16);
        ggml_tensor * mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_kv, n_batch);

        ggml_tensor * res = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f/sqrtf(d), 0.0f, 0.0f);
        ggml_prec_set_acc(res, GGML_PREC_F32);
        if (is_memory) {
            ggml_flash_attn_ext_add_state(res, memory(q));
        }
        ggml_build_forward_expand(gf, res);
    }

    // seconds of a run of the graph
    double run() {
        for (int i = 0; i < ggml_graph_n_nodes(gf); i++) {
            ggml_tensor * node = ggml_graph_node(gf, i);
            if (!ggml_backend_supports_op(backend, node)) {
                fprintf(stderr, "%s is not supported\n", ggml_op_desc(node));
                exit(3);
            }
        }
        ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors(ctx, backend);
        if (!buffer) {
            fprintf(stderr, "out of memory\n");
            exit(4);
        }
        ggml_backend_buffer_clear(buffer, 0);
        for (ggml_tensor * t : random) {
            fill(t);
        }
        std::vector<int32_t> head(3*(n_head_kv + 1));
        for (int64_t h = 0; h <= n_head_kv; h++) {
            head[h] = h*n;
            head[h + 2*(n_head_kv + 1)] = h*n_list();
        }
        for (ggml_tensor * t : lists) {
            std::vector<int32_t> list(t->ne[0]);
            for (size_t i = 0; i < list.size(); i++) {
                list[i] = i*n/n_list();
            }
            ggml_backend_tensor_set(t, list.data(), 0, list.size()*sizeof(int32_t));
        }
        for (ggml_tensor * t : heads) {
            ggml_backend_tensor_set(t, head.data(), 0, head.size()*sizeof(int32_t));
        }

        auto seconds = [&](int n_runs) {
            const int64_t start = ggml_time_us();
            for (int i = 0; i < n_runs; i++) {
                ggml_backend_graph_compute_async(backend, gf);
            }
            ggml_backend_synchronize(backend);
            return 1e-6*(ggml_time_us() - start);
        };
        seconds(3);
        const double once = seconds(1);
        const int n_runs = std::max(1, std::min(1000, (int) (1.0/once)));
        const double res = seconds(n_runs)/n_runs;

        ggml_backend_buffer_free(buffer);
        return res;
    }
};

int main(int argc, char ** argv) {
    const std::string device = argc > 2 ? argv[1] : "", what = argc > 2 ? argv[2] : "";
    const bool is_copy = what == "copy" && argc == 3;
    if (!is_copy && !((what == "prefix" || what == "memory") && argc == 9)) {
        fprintf(stderr, "usage: see the source\n");
        return 2;
    }
    ggml_time_init();
    ggml_backend_dev_t dev = ggml_backend_dev_by_type(device == "gpu" ? GGML_BACKEND_DEVICE_TYPE_GPU : GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!dev) {
        fprintf(stderr, "no %s is available\n", device.c_str());
        return 77;
    }
    backend = ggml_backend_dev_init(dev, nullptr);

    bench b = {};
    if (is_copy) {
        const size_t nbytes = (size_t) 1 << (device == "gpu" ? 31 : 28);
        ggml_tensor * x = b.table(GGML_TYPE_F32, { (int64_t) nbytes/4 });
        ggml_build_forward_expand(b.gf, ggml_cpy(b.ctx, x, ggml_dup_tensor(b.ctx, x)));
        printf("%g\n", 2e-9*nbytes/b.run());
    } else {
        b.n         = atoll(argv[3]);
        b.n_batch   = atoll(argv[4]);
        const int n_layer = atoi(argv[5]);
        b.n_head    = atoll(argv[6]);
        b.n_head_kv = atoll(argv[7]);
        b.d         = atoll(argv[8]);
        for (int i = 0; i < n_layer; i++) {
            b.add_layer(what == "memory" && b.n > 0);
        }
        printf("%g\n", 1e6*b.run()/n_layer);
    }
    ggml_free(b.ctx);
    ggml_backend_free(backend);
    return 0;
}
