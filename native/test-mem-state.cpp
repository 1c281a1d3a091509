// GGML_OP_MEM_STATE and flash attention with a state, against float64
#include "ggml.h"
#include "ggml-cpu.h"
#include "ggml-backend.h"
#include "ggml-alloc.h"
#include <vector>
#include <random>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <chrono>
#include <algorithm>
using V = std::vector<float>;
static std::mt19937 rng(0);
static float N() { static std::normal_distribution<float> d; return d(rng); }
static V deq(ggml_tensor * t) { V r(ggml_nelements(t)); if (t->type == GGML_TYPE_F32) memcpy(r.data(), t->data, r.size()*4); else for (int64_t i = 0; i < t->ne[1]; i++) ggml_get_type_traits(t->type)->to_float((char*)t->data + i*t->nb[1], r.data() + i*t->ne[0], t->ne[0]); return r; }
static void fill(ggml_tensor * t, float s) { V x(ggml_nelements(t)); for (auto & y : x) y = N()*s; if (t->type == GGML_TYPE_F32) memcpy(t->data, x.data(), x.size()*4); else for (int64_t i = 0; i < ggml_nrows(t); i++) ggml_get_type_traits_cpu(t->type)->from_float(x.data() + i*t->ne[0], (char*)t->data + i*t->nb[1], t->ne[0]); }
static double test(int dk, int dv, int n_head_kv, int g, int T, ggml_type ty, ggml_mem_kind kind, bool with_state, int nth, float gain, double * ms = nullptr, int nrow = 0) {
    ggml_init_params p = { (size_t) 1 << 30, nullptr, false };
    ggml_context * ctx = ggml_init(p);
    int H = n_head_kv*g;
    std::vector<int> off = {0};
    for (int h = 0; h < n_head_kv; h++) off.push_back(off.back() + (nrow ? nrow : (h % 4 == 3 ? 0 : 1 + rng()%300)));
    int n = std::max(off.back(), 1); if (off.back() == 0) { off.back() = 1; }
    auto * q0 = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, dk, H, T); fill(q0, 1);
    auto * q = ggml_permute(ctx, q0, 0, 2, 1, 3);
    auto * key = ggml_new_tensor_2d(ctx, ty, dk, n); fill(key, 1);
    auto * val = ggml_new_tensor_2d(ctx, ty, dv, n); fill(val, 1);
    auto * bias = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n); fill(bias, 2);
    auto * lse = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, n); fill(lse, 2);
    auto * head = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, n_head_kv + 1, 2); memset(head->data, 0, ggml_nbytes(head)); memcpy(head->data, off.data(), off.size()*4);
    ggml_tensor * st = nullptr;
    if (with_state) { st = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, dv + 1, H, T); fill(st, 2); ((float*)st->data)[dv] = -INFINITY; }
    ggml_mem_table tb = { kind, key, bias, val, kind == GGML_MEM_CENTROID || kind == GGML_MEM_RESIDUAL ? lse : nullptr, head, nullptr, nullptr, nullptr, 5, 0 };
    float scale = 1/sqrtf(dk);
    auto * r = ggml_mem_state(ctx, q, st, &tb, scale, gain);
    auto * gf = ggml_new_graph(ctx); ggml_build_forward_expand(gf, r);
    memset(r->data, 0xff, ggml_nbytes(r));
    ggml_graph_compute_with_ctx(ctx, gf, nth);
    if (ms) { double best = 1e9; for (int i = 0; i < 20; i++) { auto t0 = std::chrono::steady_clock::now(); ggml_graph_compute_with_ctx(ctx, gf, nth); best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now()-t0).count()); } *ms = best*1e3; }
    V K = deq(key), W = deq(val); double worst = 0;
    const float * B = (float*) bias->data, * L = (float*) lse->data;
    for (int t = 0; t < T; t++) for (int hh = 0; hh < H; hh++) {
        int h = hh/g; const float * x = (float*) q0->data + ((int64_t)t*H + hh)*dk;
        std::vector<std::pair<double,int>> s;
        for (int i = off[h]; i < off[h+1]; i++) { double a = 0; for (int c = 0; c < dk; c++) a += (double) K[(int64_t)i*dk+c]*x[c]; s.push_back({a*(kind >= GGML_MEM_TOKEN ? scale : 1) + B[i], i}); }
        std::vector<std::pair<double,int>> use; // logit, row
        const float * in = st ? (float*) st->data + ((int64_t)t*H + hh)*(dv+1) : nullptr;
        std::vector<double> o(dv, 0.0); double lo = -INFINITY;
        if (kind == GGML_MEM_RESIDUAL) {
            for (int c = 0; c < dv; c++) o[c] = in[c]; lo = in[dv] + gain;
            if (!s.empty()) { auto b = *std::max_element(s.begin(), s.end()); for (int c = 0; c < dv; c++) o[c] += W[(int64_t)b.second*dv+c]; lo += L[b.second]; }
        } else {
            if (!s.empty()) {
                if (kind == GGML_MEM_ANCHOR) use = s;
                else if (kind == GGML_MEM_TOKEN) { std::sort(s.rbegin(), s.rend()); if (s.size() > 5) s.resize(5); use = s; }
                else { auto b = *std::max_element(s.begin(), s.end()); use = {{kind == GGML_MEM_CENTROID ? L[b.second] : b.first, b.second}}; }
            }
            for (auto & u : use) u.first += gain;
            double mx = -INFINITY; for (auto & u : use) mx = std::max(mx, u.first); if (in) mx = std::max(mx, (double) in[dv]);
            double sum = 0;
            if (mx != -INFINITY) {
                for (auto & u : use) { double w = exp(u.first - mx); sum += w; for (int c = 0; c < dv; c++) o[c] += w*W[(int64_t)u.second*dv+c]; }
                if (in) { double w = exp(in[dv]-mx); sum += w; for (int c = 0; c < dv; c++) o[c] += w*in[c]; }
                for (auto & y : o) y /= sum; lo = mx + log(sum);
            }
        }
        const float * got = (float*) r->data + ((int64_t)t*H + hh)*(dv+1);
        for (int c = 0; c < dv; c++) { double e = std::fabs(got[c]-o[c]); if (!(e <= worst)) worst = e; }
        if (lo != got[dv]) { double e = std::fabs(lo-got[dv]); if (!(e <= worst)) worst = e; }
    }
    ggml_free(ctx); return worst;
}
static double flash(int dk, int dv, int nkv, int Hkv, int g, int T, ggml_type ty, int nth, bool quantv) {
    ggml_init_params p = { (size_t) 1 << 30, nullptr, false };
    ggml_context * ctx = ggml_init(p); int H = Hkv*g;
    auto * q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, dk, T, H); fill(q, 1);
    auto * k = ggml_new_tensor_3d(ctx, ty, dk, nkv, Hkv); fill(k, 1);
    auto * v = ggml_new_tensor_3d(ctx, ty, dv, nkv, Hkv); fill(v, 1);
    auto * m = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, nkv, T);
    for (int t = 0; t < T; t++) for (int i = 0; i < nkv; i++) ((ggml_fp16_t*)m->data)[t*nkv+i] = ggml_fp32_to_fp16(i <= nkv - 1 - T + t && !(T == 1 && nkv == 32) ? 0.0f : -INFINITY);
    auto * st = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, dv + 1, H, T); fill(st, 2); ((float*)st->data)[dv] = -INFINITY; for (int i = 1; i < H*T; i++) ((float*)st->data)[i*(dv+1)+dv] += (i%3)*4;
    float scale = 1/sqrtf(dk);
    auto * r = ggml_flash_attn_ext(ctx, q, k, v, m, scale, 0, 0); ggml_flash_attn_ext_add_state(r, st);
    auto * gf = ggml_new_graph(ctx); ggml_build_forward_expand(gf, r); memset(r->data, 0xff, ggml_nbytes(r)); ggml_graph_compute_with_ctx(ctx, gf, nth);
    V K(ggml_nelements(k)), W(ggml_nelements(v)); for (int64_t i = 0; i < ggml_nrows(k); i++) { ggml_get_type_traits(ty)->to_float ? ggml_get_type_traits(ty)->to_float((char*)k->data+i*k->nb[1], &K[i*dk], dk) : (void) memcpy(&K[i*dk], (char*)k->data+i*k->nb[1], dk*4); ggml_get_type_traits(ty)->to_float ? ggml_get_type_traits(ty)->to_float((char*)v->data+i*v->nb[1], &W[i*dv], dv): (void) memcpy(&W[i*dv], (char*)v->data+i*v->nb[1], dv*4); }
    double worst = 0;
    for (int t = 0; t < T; t++) for (int hh = 0; hh < H; hh++) { int h = hh/g; const float * x = (float*)q->data + ((int64_t)hh*T + t)*dk; const float * in = (float*)st->data + ((int64_t)t*H+hh)*(dv+1);
        std::vector<double> s(nkv, -INFINITY); double mx = in[dv]; for (int i = 0; i < nkv; i++) if (ggml_fp16_to_fp32(((ggml_fp16_t*)m->data)[t*nkv+i]) == 0) { double a = 0; for (int c = 0; c < dk; c++) a += (double)K[((int64_t)h*nkv+i)*dk+c]*x[c]; s[i] = a*scale; mx = std::max(mx, s[i]); }
        std::vector<double> o(dv, 0.0); double sum = 0; if (mx != -INFINITY) { for (int i = 0; i < nkv; i++) { double w = exp(s[i]-mx); sum += w; if (w) for (int c = 0; c < dv; c++) o[c] += w*W[((int64_t)h*nkv+i)*dv+c]; } double w = exp(in[dv]-mx); sum += w; if (w) for (int c = 0; c < dv; c++) o[c] += w*in[c]; for (auto & y : o) y /= sum; }
        const float * got = (float*)r->data + ((int64_t)t*H+hh)*dv; for (int c = 0; c < dv; c++) { double e = std::fabs(got[c]-o[c]); if (!(e <= worst)) worst = e; } }
    ggml_free(ctx); return worst;
}
int main(int argc, char ** argv) {
    ggml_cpu_init();
    if (argc > 1) { for (int nth : {1, 2}) for (int T : {1, 4, 16, 128, 512}) for (auto ty : {GGML_TYPE_Q8_0, GGML_TYPE_F16}) { double ms; test(64, 64, 3, 3, T, ty, GGML_MEM_ANCHOR, false, nth, 0, &ms, 512); printf("threads %d, tokens %d, %s: %.3f ms for 1536 rows, %.1f ns per row, %.2f per row and query\n", nth, T, ggml_type_name(ty), ms, ms*1e6/1536, ms*1e6/1536/3/T); } return 0; }
    for (auto ty : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0}) for (int kind = 0; kind < 5; kind++) for (auto d : {std::pair(64,64), std::pair(128,96), std::pair(96, 256)}) { double w = 0; for (int T : {1, 3, 5, 40, 130}) for (int g : {1, 3, 8}) for (int nth : {1, 2, 5}) for (int s = 0; s < 2; s++) { if (kind == GGML_MEM_RESIDUAL && !s) continue; w = std::max(w, test(d.first, d.second, 4, g, T, ty, (ggml_mem_kind) kind, s, nth, s ? 0.0f : 0.7f)); } printf("%s kind %d d %d %d: %g\n", ggml_type_name(ty), kind, d.first, d.second, w); }
    printf("gain -inf: %g\n", test(64, 64, 3, 3, 2, GGML_TYPE_F16, GGML_MEM_ANCHOR, true, 2, -INFINITY));
    for (auto ty : {GGML_TYPE_F16, GGML_TYPE_F32, GGML_TYPE_Q8_0}) for (int T : {1, 5, 70}) for (int nkv : {32, 256, 1024}) for (int nth : {1, 3}) printf("flash %s T %d kv %d threads %d: %g\n", ggml_type_name(ty), T, nkv, nth, flash(64, 64, nkv, 3, 3, T, ty, nth, false));
}
