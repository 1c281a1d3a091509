// The kernels of GGML_OP_MEM_STATE: attention over the anchors of a memory, exact scans, and the search of lists
//
// The queries of a KV head are numbered head by head: j is the token j % n_tokens of its query head j / n_tokens.
// 8 threads read a row, 8 values each at a time.
#pragma once

#include "common.cuh"

#define MEM_MAX_EMBD   256
#define MEM_MAX_LISTS 8192 // their scores are in shared memory
#define MEM_MAX_TOP_K 1024
#define MEM_THREADS    256
#define MEM_TILE_ROWS   64
#define MEM_ROW_LANES    8

struct mem_state_args {
    const char  * q;      // [d_k, n_tokens, n_head]
    const float * state;  // [d_v + 1, n_head, n_tokens] to merge with, or nullptr
    float       * dst;    // [d_v + 1, n_head, n_tokens]

    const char    * key;
    const float   * bias;
    const char    * value;
    const float   * lse;
    const int32_t * offset; // [n_head_kv + 1]

    const char    * list_key;
    const float   * list_bias;
    const int32_t * list;        // [n_list + 1]
    const int32_t * list_offset; // [n_head_kv + 1]

    size_t nb_q1, nb_q2, nb_key, nb_value, nb_list;
    int    type_key, type_value, type_list;

    int   kind;
    int   d_k, d_v, n_tokens, n_head_kv, n_gqa;
    int   n_probe, min_entries, top_k;
    float scale, gain;

    __host__ __device__ int n_q() const { return n_gqa*n_tokens; } // queries of a KV head

    __device__ const float * query(const int h, const int j) const {
        return (const float *) (q + (h*n_gqa + j/n_tokens)*nb_q2 + (j % n_tokens)*nb_q1);
    }

    __device__ int64_t row(const int h, const int j) const {
        return (int64_t(j % n_tokens)*n_head_kv*n_gqa + h*n_gqa + j/n_tokens)*(d_v + 1);
    }
};

// the best entry of a table; entry is -1 if there is none
struct mem_best {
    float score;
    int   entry;
};

static __device__ __forceinline__ mem_best mem_better(const mem_best a, const mem_best b) {
    return b.entry >= 0 && (a.entry < 0 || b.score > a.score || (b.score == a.score && b.entry < a.entry)) ? b : a;
}

static __device__ __forceinline__ mem_best mem_warp_best(mem_best best) {
#pragma unroll
    for (int offset = WARP_SIZE/2; offset > 0; offset >>= 1) {
        const mem_best other = { __shfl_xor_sync(0xFFFFFFFF, best.score, offset), __shfl_xor_sync(0xFFFFFFFF, best.entry, offset) };
        best = mem_better(best, other);
    }
    return best;
}

// x = N values of a row from column c on; N is 2 or 8, c a multiple of N
template <int N>
static __device__ __forceinline__ void mem_load(const int type, const char * row, const int c, float * x) {
    if (type == GGML_TYPE_F16) {
        __align__(2*N) half2 y[N/2];
        ggml_cuda_memcpy_1<N*sizeof(half)>(y, (const half *) row + c);
#pragma unroll
        for (int i = 0; i < N/2; ++i) {
            const float2 z = __half22float2(y[i]);
            x[2*i]     = z.x;
            x[2*i + 1] = z.y;
        }
    } else if (type == GGML_TYPE_Q8_0) {
        const block_q8_0 * block = (const block_q8_0 *) row + c/QK8_0;
        const float        d     = __half2float(block->d);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = d*block->qs[c % QK8_0 + i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = ((const float *) row)[c + i];
        }
    }
}

// sum[jq] = row*q[jq], with q [NQ][d], in all of the 8 lanes that read the row; all lanes of a warp must take part
template <int NQ>
static __device__ __forceinline__ void mem_dot(const int type, const char * row, const float * q, const int d, float * sum) {
#pragma unroll
    for (int jq = 0; jq < NQ; ++jq) {
        sum[jq] = 0.0f;
    }
    for (int c = 8*(threadIdx.x % MEM_ROW_LANES); c < d; c += 8*MEM_ROW_LANES) {
        float x[8];
        mem_load<8>(type, row, c, x);
#pragma unroll
        for (int jq = 0; jq < NQ; ++jq) {
#pragma unroll
            for (int l = 0; l < 8; ++l) {
                sum[jq] += x[l]*q[jq*d + c + l];
            }
        }
    }
#pragma unroll
    for (int jq = 0; jq < NQ; ++jq) {
#pragma unroll
        for (int offset = MEM_ROW_LANES/2; offset > 0; offset >>= 1) {
            sum[jq] += __shfl_xor_sync(0xFFFFFFFF, sum[jq], offset);
        }
    }
}

// s[jq*stride + i] = scale*row*q[jq] + bias for n_rows rows from i0 on; all warps of a block take part
template <int NQ>
static __device__ void mem_score(
        const int type, const char * table, const size_t nb, const float * bias, const int i0, const int n_rows,
        const float * q, const int d, const float scale, float * s, const int stride) {
    // lanes beyond the last row read it again, because all of them take part in the sums
    for (int i1 = 0; i1 < n_rows; i1 += blockDim.x/MEM_ROW_LANES) {
        const int i = min(i1 + int(threadIdx.x)/MEM_ROW_LANES, n_rows - 1);

        float sum[NQ];
        mem_dot<NQ>(type, table + int64_t(i0 + i)*nb, q, d, sum);
        if (threadIdx.x % MEM_ROW_LANES == 0) {
#pragma unroll
            for (int jq = 0; jq < NQ; ++jq) {
                s[jq*stride + i] = sum[jq]*scale + bias[i0 + i];
            }
        }
    }
}

template <int NQ>
static __device__ void mem_load_queries(const mem_state_args & a, const int h, const int j0, float * q) {
    for (int i = threadIdx.x; i < NQ*a.d_k; i += blockDim.x) {
        const int j = j0 + i/a.d_k;
        q[i] = j < a.n_q() ? a.query(h, j)[i % a.d_k] : 0.0f;
    }
    __syncthreads();
}

// writes the state of terms, merged with the state that came in
// sum and o are the sums of the terms and of their weighted values, relative to max; o(c) is column c
template <typename F>
static __device__ void mem_finish(const mem_state_args & a, const int h, const int j, float max, const float sum, F o) {
    const float * in  = a.state ? a.state + a.row(h, j) : nullptr;
    float       * out = a.dst + a.row(h, j);

    max += a.gain;
    const float lse_in = in ? in[a.d_v] : -INFINITY;
    const float top    = fmaxf(max, lse_in);
    const float w      = max    == -INFINITY ? 0.0f : expf(max    - top);
    const float w_in   = lse_in == -INFINITY ? 0.0f : expf(lse_in - top);
    const float total  = w*sum + w_in;

    for (int c = threadIdx.x; c < a.d_v; c += blockDim.x) {
        float x = 0.0f;
        if (w > 0.0f) {
            x += w*o(c);
        }
        if (w_in > 0.0f) {
            x += w_in*in[c];
        }
        out[c] = total > 0.0f ? x/total : 0.0f;
    }
    if (threadIdx.x == 0) {
        out[a.d_v] = total > 0.0f ? top + logf(total) : -INFINITY;
    }
}

// writes the state of a query whose best entry is known
static __device__ void mem_take(const mem_state_args & a, const int h, const int j, const mem_best best) {
    auto value = [&](const int c) {
        float x[2];
        mem_load<2>(a.type_value, a.value + best.entry*a.nb_value, c & ~1, x);
        return x[c & 1];
    };

    if (a.kind == GGML_MEM_RESIDUAL) {
        const float * in  = a.state + a.row(h, j);
        float       * out = a.dst   + a.row(h, j);
        for (int c = threadIdx.x; c < a.d_v; c += blockDim.x) {
            out[c] = in[c] + (best.entry >= 0 ? value(c) : 0.0f);
        }
        if (threadIdx.x == 0) {
            out[a.d_v] = in[a.d_v] + a.gain + (best.entry >= 0 ? a.lse[best.entry] : 0.0f);
        }
        return;
    }

    const float lse = best.entry < 0 ? -INFINITY : a.kind == GGML_MEM_CENTROID ? a.lse[best.entry] : best.score;
    mem_finish(a, h, j, lse, 1.0f, value);
}

// first and last row of the share of a block of the rows of a head
static __device__ int2 mem_share(const mem_state_args & a, const int h) {
    const int64_t n = a.offset[h + 1] - a.offset[h];
    return { int(a.offset[h] + n*blockIdx.x/gridDim.x), int(a.offset[h] + n*(blockIdx.x + 1)/gridDim.x) };
}

// adds up o over the groups of threads, to o_sum [NQ][d_v]; a thread has the columns c and c + 1 of NQ values in o
// one group after another, so that the sums are the same in every run
template <int NQ>
static __device__ void mem_sum_groups(const float (*o)[2], const int group, const int n_group, const int c, const int d_v, float * o_sum) {
    for (int g = 0; g < n_group; ++g) {
        if (group == g) {
#pragma unroll
            for (int jq = 0; jq < NQ; ++jq) {
                float * to = o_sum + jq*d_v + c;
                to[0] = (g > 0 ? to[0] : 0.0f) + o[jq][0];
                to[1] = (g > 0 ? to[1] : 0.0f) + o[jq][1];
            }
        }
        __syncthreads();
    }
}

//
// anchors: gridDim is (shares of the rows, blocks of NQ queries, KV heads)
//

// partial: (max, sum, o) of each share [n_head_kv, n_q, gridDim.x, d_v + 2], or nullptr if there is one share
template <int NQ>
static __global__ void __launch_bounds__(MEM_THREADS) mem_attend(const mem_state_args a, float * partial) {
    static_assert(NQ <= MEM_THREADS/WARP_SIZE, "a warp per query");

    const int tid  = threadIdx.x;
    const int warp = tid / WARP_SIZE;
    const int lane = tid % WARP_SIZE;
    const int h    = blockIdx.z;
    const int j0   = blockIdx.y*NQ;

    __shared__ float q[NQ*MEM_MAX_EMBD];
    __shared__ float s[NQ*MEM_TILE_ROWS];
    __shared__ float o_sum[NQ*MEM_MAX_EMBD];
    __shared__ float fix[NQ], max_q[NQ], sum_q[NQ];

    ggml_cuda_pdl_sync();
    mem_load_queries<NQ>(a, h, j0, q);

    // of the query of this warp
    float max = -INFINITY;
    float sum = 0.0f;

    // of two columns of the values, in some of the rows
    const int  n_group = MEM_THREADS/(a.d_v/2);
    const int  group   = tid/(a.d_v/2);
    const int  c       = 2*(tid % (a.d_v/2));
    float o[NQ][2] = {{0.0f}};

    const int2 rows = mem_share(a, h);
    for (int i0 = rows.x; i0 < rows.y; i0 += MEM_TILE_ROWS) {
        const int n = min(MEM_TILE_ROWS, rows.y - i0);

        mem_score<NQ>(a.type_key, a.key, a.nb_key, a.bias, i0, n, q, a.d_k, a.scale, s, MEM_TILE_ROWS);
        __syncthreads();

        if (warp < NQ) {
            float top = max;
            for (int i = lane; i < n; i += WARP_SIZE) {
                top = fmaxf(top, s[warp*MEM_TILE_ROWS + i]);
            }
            top = warp_reduce_max(top);

            float add = 0.0f;
            for (int i = lane; i < n; i += WARP_SIZE) {
                const float p = expf(s[warp*MEM_TILE_ROWS + i] - top);
                s[warp*MEM_TILE_ROWS + i] = p;
                add += p;
            }
            const float c_old = expf(max - top);
            sum = sum*c_old + warp_reduce_sum(add);
            max = top;
            if (lane == 0) {
                fix[warp] = c_old;
            }
        }
        __syncthreads();

        if (group < n_group) {
#pragma unroll
            for (int jq = 0; jq < NQ; ++jq) {
                o[jq][0] *= fix[jq];
                o[jq][1] *= fix[jq];
            }
            for (int i = group; i < n; i += n_group) {
                float v[2];
                mem_load<2>(a.type_value, a.value + int64_t(i0 + i)*a.nb_value, c, v);
#pragma unroll
                for (int jq = 0; jq < NQ; ++jq) {
                    const float p = s[jq*MEM_TILE_ROWS + i];
                    o[jq][0] += p*v[0];
                    o[jq][1] += p*v[1];
                }
            }
        }
        __syncthreads();
    }

    if (warp < NQ && lane == 0) {
        max_q[warp] = max;
        sum_q[warp] = sum;
    }
    mem_sum_groups<NQ>(o, group, n_group, c, a.d_v, o_sum);

    for (int jq = 0; jq < NQ && j0 + jq < a.n_q(); ++jq) {
        if (!partial) {
            mem_finish(a, h, j0 + jq, max_q[jq], sum_q[jq], [&](const int c) { return o_sum[jq*a.d_v + c]; });
            continue;
        }
        float * to = partial + ((int64_t(h)*a.n_q() + j0 + jq)*gridDim.x + blockIdx.x)*(a.d_v + 2);
        for (int i = tid; i < a.d_v; i += MEM_THREADS) {
            to[2 + i] = o_sum[jq*a.d_v + i];
        }
        if (tid == 0) {
            to[0] = max_q[jq];
            to[1] = sum_q[jq];
        }
    }
}

// merges the shares of a query: gridDim is (queries of a KV head, KV heads)
static __global__ void mem_attend_merge(const mem_state_args a, const float * partial, const int n_share) {
    const int h = blockIdx.y;
    const int j = blockIdx.x;

    const int     stride = a.d_v + 2;
    const float * part   = partial + (int64_t(h)*a.n_q() + j)*n_share*stride;

    ggml_cuda_pdl_sync();

    float max = -INFINITY;
    for (int i = 0; i < n_share; ++i) {
        max = fmaxf(max, part[i*stride]);
    }
    auto weight = [&](const int i) { return part[i*stride] == -INFINITY ? 0.0f : expf(part[i*stride] - max); };

    float sum = 0.0f;
    for (int i = 0; i < n_share; ++i) {
        sum += weight(i)*part[i*stride + 1];
    }
    mem_finish(a, h, j, max, sum, [&](const int c) {
        float x = 0.0f;
        for (int i = 0; i < n_share; ++i) {
            x += weight(i)*part[i*stride + 2 + c];
        }
        return x;
    });
}

//
// exact scan for the best entry: gridDim as for anchors
//

// partial: the best of each share [n_head_kv, n_q, gridDim.x], or nullptr if there is one share
template <int NQ>
static __global__ void __launch_bounds__(MEM_THREADS) mem_scan(const mem_state_args a, mem_best * partial) {
    const int tid  = threadIdx.x;
    const int warp = tid / WARP_SIZE;
    const int lane = tid % WARP_SIZE;
    const int h    = blockIdx.z;
    const int j0   = blockIdx.y*NQ;

    __shared__ float    q[NQ*MEM_MAX_EMBD];
    __shared__ float    s[NQ*MEM_TILE_ROWS];
    __shared__ mem_best best_of[NQ];

    ggml_cuda_pdl_sync();
    mem_load_queries<NQ>(a, h, j0, q);

    mem_best best = { -INFINITY, -1 };

    const int2 rows = mem_share(a, h);
    for (int i0 = rows.x; i0 < rows.y; i0 += MEM_TILE_ROWS) {
        const int n = min(MEM_TILE_ROWS, rows.y - i0);

        mem_score<NQ>(a.type_key, a.key, a.nb_key, a.bias, i0, n, q, a.d_k, a.scale, s, MEM_TILE_ROWS);
        __syncthreads();

        if (warp < NQ) {
            for (int i = lane; i < n; i += WARP_SIZE) {
                best = mem_better(best, { s[warp*MEM_TILE_ROWS + i], i0 + i });
            }
        }
        __syncthreads();
    }

    if (warp < NQ) {
        best = mem_warp_best(best);
        if (lane == 0) {
            best_of[warp] = best;
        }
    }
    __syncthreads();

    for (int jq = 0; jq < NQ && j0 + jq < a.n_q(); ++jq) {
        if (!partial) {
            mem_take(a, h, j0 + jq, best_of[jq]);
        } else if (tid == 0) {
            partial[(int64_t(h)*a.n_q() + j0 + jq)*gridDim.x + blockIdx.x] = best_of[jq];
        }
    }
}

// merges the shares of a query: gridDim is (queries of a KV head, KV heads)
static __global__ void mem_scan_merge(const mem_state_args a, const mem_best * partial, const int n_share) {
    const int h = blockIdx.y;
    const int j = blockIdx.x;

    ggml_cuda_pdl_sync();

    mem_best best = { -INFINITY, -1 };
    for (int i = 0; i < n_share; ++i) {
        best = mem_better(best, partial[(int64_t(h)*a.n_q() + j)*n_share + i]);
    }
    mem_take(a, h, j, best);
}

//
// search of lists: a block for each query, gridDim is (queries of a KV head, KV heads)
//

static __global__ void __launch_bounds__(2*MEM_THREADS) mem_probe(const mem_state_args a) {
    constexpr int n_warp = 2*MEM_THREADS/WARP_SIZE;

    const int tid  = threadIdx.x;
    const int warp = tid / WARP_SIZE;
    const int lane = tid % WARP_SIZE;
    const int h    = blockIdx.y;
    const int j    = blockIdx.x;

    __shared__ float    q[MEM_MAX_EMBD];
    __shared__ mem_best best_of[n_warp];
    __shared__ float    score[MEM_MAX_LISTS];

    ggml_cuda_pdl_sync();
    mem_load_queries<1>(a, h, j, q);

    const int n0     = a.offset[h];
    const int n      = a.offset[h + 1] - n0;
    const int list0  = a.list_offset[h];
    const int n_list = a.list_offset[h + 1] - list0;

    mem_best best = { -INFINITY, -1 };

    // updates best by the rows i0 .. i1 - 1, in all lanes of a warp: 8 lanes read a row, so 4 rows at a time
    auto search = [&](const int i0, const int i1) {
        for (int i2 = i0; i2 < i1; i2 += WARP_SIZE/MEM_ROW_LANES) {
            const int i = min(i2 + lane/MEM_ROW_LANES, i1 - 1);
            float sum;
            mem_dot<1>(a.type_key, a.key + int64_t(i)*a.nb_key, q, a.d_k, &sum);
            best = mem_better(best, { sum*a.scale + a.bias[i], i });
        }
    };

    if (n < a.min_entries || n_list > MEM_MAX_LISTS) {
        const int share = (n + n_warp - 1)/n_warp;
        search(n0 + min(n, warp*share), n0 + min(n, (warp + 1)*share));
    } else {
        mem_score<1>(a.type_list, a.list_key, a.nb_list, a.list_bias, list0, n_list, q, a.d_k, a.scale, score, 0);
        __syncthreads();

        // every warp goes through the lists, the best first, and searches every n_warp-th of them
        float bound = INFINITY;
        int   last  = -1;
        for (int k = 0; k < min(a.n_probe, n_list); ++k) {
            mem_best next = { -INFINITY, -1 };
            for (int i = lane; i < n_list; i += WARP_SIZE) {
                if (score[i] < bound || (score[i] == bound && i > last)) {
                    next = mem_better(next, { score[i], i });
                }
            }
            next  = mem_warp_best(next);
            bound = next.score;
            last  = next.entry;
            if (last < 0) {
                break;
            }
            if (k % n_warp == warp) {
                search(a.list[list0 + last], a.list[list0 + last + 1]);
            }
        }
    }

    best = mem_warp_best(best);
    if (lane == 0) {
        best_of[warp] = best;
    }
    __syncthreads();

    best = best_of[0];
    for (int i = 1; i < n_warp; ++i) {
        best = mem_better(best, best_of[i]);
    }
    mem_take(a, h, j, best);
}

//
// attention over the top_k entries: a block for each query, gridDim is (queries from j_first on, KV heads)
//

// an unsigned number with the order of a float
static __device__ __forceinline__ uint32_t mem_ordered(const float x) {
    const uint32_t bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// scores: [n_head_kv, gridDim.x, stride], a work buffer
static __global__ void __launch_bounds__(MEM_THREADS) mem_attend_top(const mem_state_args a, const int j_first, float * scores, const int64_t stride) {
    constexpr int n_warp = MEM_THREADS/WARP_SIZE;

    const int tid  = threadIdx.x;
    const int warp = tid / WARP_SIZE;
    const int lane = tid % WARP_SIZE;
    const int h    = blockIdx.y;
    const int j    = j_first + blockIdx.x;

    __shared__ float    q[MEM_MAX_EMBD];
    __shared__ float    o_sum[MEM_MAX_EMBD];
    __shared__ int      count[256];
    __shared__ int2     warp_count[n_warp]; // x: entries above the k-th largest score; y: entries with just that score
    __shared__ uint32_t kth;
    __shared__ int      n_kth;              // number of entries with just that score that are taken
    __shared__ int      chosen[MEM_MAX_TOP_K];
    __shared__ float    p[MEM_MAX_TOP_K];

    ggml_cuda_pdl_sync();
    mem_load_queries<1>(a, h, j, q);

    const int n0 = a.offset[h];
    const int n  = a.offset[h + 1] - n0;
    const int k  = min(n, a.top_k);

    float * s = scores + (int64_t(h)*gridDim.x + blockIdx.x)*stride;
    mem_score<1>(a.type_key, a.key, a.nb_key, a.bias, n0, n, q, a.d_k, a.scale, s, 0);

    // finds the k-th largest score by radix select, the highest byte first
    if (tid == 0) {
        kth   = 0;
        n_kth = k;
    }
    for (int shift = 24; shift >= 0; shift -= 8) {
        count[tid] = 0;
        __syncthreads();
        for (int i = tid; i < n; i += MEM_THREADS) {
            const uint32_t x = mem_ordered(s[i]);
            if (shift == 24 || (x ^ kth) >> (shift + 8) == 0) {
                atomicAdd(&count[(x >> shift) & 0xFF], 1);
            }
        }
        __syncthreads();
        if (tid == 0) {
            int b = 255;
            while (b > 0 && count[b] < n_kth) {
                n_kth -= count[b--];
            }
            kth |= uint32_t(b) << shift;
        }
        __syncthreads();
    }

    // chooses entries in the order of the table, each warp from its share of the table
    const int i_begin = int64_t(n)*warp/n_warp;
    const int i_end   = int64_t(n)*(warp + 1)/n_warp;

    auto ballots = [&](const int i0) {
        const uint32_t x = i0 + lane < i_end ? mem_ordered(s[i0 + lane]) : 0;
        return uint2{ __ballot_sync(0xFFFFFFFF, i0 + lane < i_end && x > kth), __ballot_sync(0xFFFFFFFF, i0 + lane < i_end && x == kth) };
    };

    int2 n_mine = { 0, 0 };
    for (int i0 = i_begin; i0 < i_end; i0 += WARP_SIZE) {
        const uint2 ballot = ballots(i0);
        n_mine.x += __popc(ballot.x);
        n_mine.y += __popc(ballot.y);
    }
    if (lane == 0) {
        warp_count[warp] = n_mine;
    }
    __syncthreads();

    int2 before = { 0, 0 };
    for (int w = 0; w < warp; ++w) {
        before.x += warp_count[w].x;
        before.y += warp_count[w].y;
    }
    for (int i0 = i_begin; i0 < i_end; i0 += WARP_SIZE) {
        const uint2    ballot = ballots(i0);
        const uint32_t lower = (1u << lane) - 1;
        const int      rank  = before.y + __popc(ballot.y & lower);
        const int      pos   = before.x + __popc(ballot.x & lower) + min(rank, n_kth);
        if (ballot.x >> lane & 1 || (ballot.y >> lane & 1 && rank < n_kth)) {
            chosen[pos] = n0 + i0 + lane;
            p[pos]      = s[i0 + lane];
        }
        before.x += __popc(ballot.x);
        before.y += __popc(ballot.y);
    }
    __syncthreads();

    float max = -INFINITY;
    for (int i = lane; i < k; i += WARP_SIZE) {
        max = fmaxf(max, p[i]);
    }
    max = warp_reduce_max(max);
    __syncthreads();

    for (int i = tid; i < k; i += MEM_THREADS) {
        p[i] = expf(p[i] - max);
    }
    __syncthreads();

    float sum = 0.0f;
    for (int i = lane; i < k; i += WARP_SIZE) {
        sum += p[i];
    }
    sum = warp_reduce_sum(sum);

    const int n_group = MEM_THREADS/(a.d_v/2);
    const int group   = tid/(a.d_v/2);
    const int c       = 2*(tid % (a.d_v/2));
    float o[2] = {0.0f};
    if (group < n_group) {
        for (int i = group; i < k; i += n_group) {
            float v[2];
            mem_load<2>(a.type_value, a.value + int64_t(chosen[i])*a.nb_value, c, v);
            o[0] += p[i]*v[0];
            o[1] += p[i]*v[1];
        }
    }
    mem_sum_groups<1>(&o, group, n_group, c, a.d_v, o_sum);

    mem_finish(a, h, j, max, sum, [&](const int c) { return o_sum[c]; });
}

//
// merges two states: a block for each row
//

static __global__ void mem_merge(const float * x, const float * y, float * dst, const int d_v) {
    ggml_cuda_pdl_sync();

    mem_state_args a = {};
    a.state     = y + int64_t(blockIdx.x)*(d_v + 1);
    a.dst       = dst + int64_t(blockIdx.x)*(d_v + 1);
    a.d_v       = d_v;
    a.n_tokens  = a.n_gqa = a.n_head_kv = 1;

    const float * row = x + int64_t(blockIdx.x)*(d_v + 1);
    mem_finish(a, 0, 0, row[d_v], 1.0f, [&](const int c) { return row[c]; });
}
