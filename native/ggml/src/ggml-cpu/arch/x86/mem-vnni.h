// Rows of Q8_0 by few queries or weights, on CPUs that multiply and add bytes in one instruction
//
// A query or weight becomes an integer of three bytes, b0 + 256*b1 + 256^2*b2. It loses less than 2^-23 of the largest one, as F32
// does. The products with each of the three bytes have a sum of their own, which is exact, and each row or column has a lane. One
// factor of a product is unsigned: 128 is added to rows, and a sum begins with the negative of what this adds to it.
//
// While a tile is computed, the next one is fetched part by part: the CPU drops requests if too many come at once.
#pragma once

constexpr int MEM_BYTES = 3;

// rows or numbers in a vector
constexpr int MEM_LANES = 16;

// N numbers in three bytes each
template <int64_t N>
struct mem_bytes {
    int8_t  y[N/4][4][4]; // of each four numbers: their bytes 0, bytes 1, bytes 2, and four that are not used
    int32_t begin[4];     // by byte: what a sum of products begins with
    float   unit;         // a number is its integer times the unit

    // f(i) gives the numbers i .. i + MEM_LANES - 1
    template <typename F>
    void set(F f) {
        __m512 top = _mm512_set1_ps(1e-30f); // has an inverse
        for (int64_t i = 0; i < N; i += MEM_LANES) {
            top = _mm512_max_ps(top, _mm512_abs_ps(f(i)));
        }
        const float   max = _mm512_reduce_max_ps(top);
        const __m512  inv = _mm512_set1_ps(0x7f7f00/max);
        const __m512i add = _mm512_set1_epi32(0x808080); // bytes with 128 added to each are unsigned
        const __m512i by_byte = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < N; i += MEM_LANES) {
            const __m512i x = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(f(i), inv)), add);
            const __m512i b = _mm512_shuffle_epi8(_mm512_xor_si512(x, add), by_byte);
            _mm512_storeu_si512(y[i/4], b);
            sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), b);
        }
        const __m256i half    = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
        const __m128i quarter = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
        _mm_storeu_si128((__m128i *) begin, _mm_sub_epi32(_mm_setzero_si128(), quarter));
        unit = max/0x7f7f00;
    }

    // one byte of each of the numbers i .. i + 3, in all lanes
    __m512i four(int64_t i, int byte) const {
        int32_t x;
        memcpy(&x, y[i/4][byte], sizeof(x));
        return _mm512_set1_epi32(x);
    }
};

// to each byte
static inline __m512i mem_add_128(__m512i x) {
    return _mm512_xor_si512(x, _mm512_set1_epi8(-128));
}

// x[0] + 256*x[1] + 256^2*x[2]
static inline __m512 mem_sum_bytes(const __m512i * x) {
    const __m512i low = _mm512_add_epi32(x[0], _mm512_slli_epi32(x[1], 8));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(x[2]), _mm512_set1_ps(0x10000), _mm512_cvtepi32_ps(low));
}

// the scales of the blocks block(0) .. block(MEM_LANES - 1)
template <typename F>
static inline __m512 mem_scales(F block) {
    ggml_fp16_t d[MEM_LANES];
    for (int r = 0; r < MEM_LANES; r++) {
        d[r] = block(r).d;
    }
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) d));
}

using mem_query_block = mem_bytes<QK8_0>;

// row(r) are 16 bytes of row r; y[i] gets the bytes 4*i .. 4*i + 3 of all rows, with 128 added
template <typename F>
static inline void mem_transpose(F row, __m512i * y) {
    __m512i x[4];
    for (int r = 0; r < 4; r++) {
        auto load = [&](int i) { return _mm_loadu_si128((const __m128i *) row(r + i)); };
        x[r] = _mm512_castsi128_si512(load(0));
        x[r] = _mm512_inserti32x4(x[r], load(4), 1);
        x[r] = _mm512_inserti32x4(x[r], load(8), 2);
        x[r] = mem_add_128(_mm512_inserti32x4(x[r], load(12), 3));
    }
    const __m512i lo01 = _mm512_unpacklo_epi32(x[0], x[1]);
    const __m512i hi01 = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i lo23 = _mm512_unpacklo_epi32(x[2], x[3]);
    const __m512i hi23 = _mm512_unpackhi_epi32(x[2], x[3]);
    y[0] = _mm512_unpacklo_epi64(lo01, lo23);
    y[1] = _mm512_unpackhi_epi64(lo01, lo23);
    y[2] = _mm512_unpacklo_epi64(hi01, hi23);
    y[3] = _mm512_unpackhi_epi64(hi01, hi23);
}

// s[j*MEM_TILE_ROWS + i] = k[i]*q[j] for n rows of size d and NQ queries, 4 at most; s behind n is overwritten
template <int NQ>
static void mem_dot_vnni(int64_t n, int64_t d, const char * k, size_t row_size, const mem_query_block * q, float * s) {
    for (int64_t i = 0; i < n; i += MEM_LANES) {
        mem_prefetch<MEM_CACHE_L2>(k + (i + MEM_TILE_ROWS)*row_size, MEM_LANES*row_size);

        const block_q8_0 * row[MEM_LANES];
        for (int r = 0; r < MEM_LANES; r++) {
            row[r] = (const block_q8_0 *) (k + std::min(i + r, n - 1)*row_size);
        }
        __m512 sum[NQ];
        for (int j = 0; j < NQ; j++) {
            sum[j] = _mm512_setzero_ps();
        }
        for (int64_t c = 0; c < d/QK8_0; c++) {
            const mem_query_block * q_c[NQ];
            __m512i acc[NQ][MEM_BYTES];
            for (int j = 0; j < NQ; j++) {
                q_c[j] = q + j*d/QK8_0 + c;
                for (int b = 0; b < MEM_BYTES; b++) {
                    acc[j][b] = _mm512_set1_epi32(q_c[j]->begin[b]);
                }
            }
            for (int l = 0; l < QK8_0; l += 16) {
                __m512i x[4];
                mem_transpose([&](int r) { return row[r][c].qs + l; }, x);
                for (int m = 0; m < 4; m++) {
                    for (int j = 0; j < NQ; j++) {
                        for (int b = 0; b < MEM_BYTES; b++) {
                            acc[j][b] = _mm512_dpbusd_epi32(acc[j][b], x[m], q_c[j]->four(l + 4*m, b));
                        }
                    }
                }
            }
            const __m512 scale = mem_scales([&](int r) -> const block_q8_0 & { return row[r][c]; });
            for (int j = 0; j < NQ; j++) {
                const __m512 unit = _mm512_set1_ps(q_c[j]->unit);
                sum[j] = _mm512_fmadd_ps(mem_sum_bytes(acc[j]), _mm512_mul_ps(scale, unit), sum[j]);
            }
        }
        for (int j = 0; j < NQ; j++) {
            _mm512_storeu_ps(s + j*MEM_TILE_ROWS + i, sum[j]);
        }
    }
}

// o[j] += sum_i s[j*MEM_TILE_ROWS + i]*v[i] for n rows of size d, one tile at most, and NQ queries, 4 at most
// the weights behind n are 0
template <int NQ>
static void mem_weigh_vnni(int64_t n, int64_t d, const float * s, const char * v, size_t row_size, float * o) {
    const block_q8_0 * row[MEM_TILE_ROWS];
    for (int64_t i = 0; i < MEM_TILE_ROWS; i++) {
        row[i] = (const block_q8_0 *) (v + std::min(i, n - 1)*row_size);
    }
    const size_t part = MEM_TILE_ROWS*row_size*QK8_0/d;
    for (int64_t c = 0; c < d/QK8_0; c++) {
        mem_prefetch<MEM_CACHE_L2>(v + MEM_TILE_ROWS*row_size + c*part, part);

        // the scales of the rows go into their weights
        float scale[MEM_TILE_ROWS] = {};
        for (int64_t i = 0; i < n; i += MEM_LANES) {
            _mm512_storeu_ps(scale + i, mem_scales([&](int r) -> const block_q8_0 & { return row[i + r][c]; }));
        }
        mem_bytes<MEM_TILE_ROWS> w[NQ];
        for (int j = 0; j < NQ; j++) {
            w[j].set([&](int64_t i) { return _mm512_mul_ps(_mm512_loadu_ps(s + j*MEM_TILE_ROWS + i), _mm512_loadu_ps(scale + i)); });
        }

        auto columns = [&](auto unpack, float * o_c) {
            __m512i acc[NQ][MEM_BYTES];
            for (int j = 0; j < NQ; j++) {
                for (int b = 0; b < MEM_BYTES; b++) {
                    acc[j][b] = _mm512_set1_epi32(w[j].begin[b]);
                }
            }
            for (int64_t i = 0; i < n; i += 4) {
                __m256i x[4];
                for (int r = 0; r < 4; r++) {
                    x[r] = _mm256_loadu_si256((const __m256i *) row[i + r][c].qs);
                }
                const __m256i x01 = unpack(x[0], x[1]);
                const __m256i x23 = unpack(x[2], x[3]);
                const __m512i y   = mem_add_128(_mm512_inserti64x4(_mm512_castsi256_si512(_mm256_unpacklo_epi16(x01, x23)), _mm256_unpackhi_epi16(x01, x23), 1));
                for (int j = 0; j < NQ; j++) {
                    for (int b = 0; b < MEM_BYTES; b++) {
                        acc[j][b] = _mm512_dpbusd_epi32(acc[j][b], y, w[j].four(i, b));
                    }
                }
            }
            for (int j = 0; j < NQ; j++) {
                const __m512 x = mem_sum_bytes(acc[j]);
                const __m512 z = _mm512_mul_ps(_mm512_shuffle_f32x4(x, x, _MM_SHUFFLE(3, 1, 2, 0)), _mm512_set1_ps(w[j].unit));
                float * o_j = o_c + j*d;
                _mm256_storeu_ps(o_j,      _mm256_add_ps(_mm256_loadu_ps(o_j),      _mm512_castps512_ps256(z)));
                _mm256_storeu_ps(o_j + 16, _mm256_add_ps(_mm256_loadu_ps(o_j + 16), _mm512_extractf32x8_ps(z, 1)));
            }
        };
        columns([](__m256i x, __m256i y) { return _mm256_unpacklo_epi8(x, y); }, o + c*QK8_0);     // and those from 16 on
        columns([](__m256i x, __m256i y) { return _mm256_unpackhi_epi8(x, y); }, o + c*QK8_0 + 8); // and those from 24 on
    }
}

struct mem_kernels_vnni : mem_kernels_avx512 {
    static void prepare(const ggml_tensor * key, const float * q, int64_t n_q, float * work) {
        static_assert(MEM_GEMM_MIN_QUERIES*sizeof(mem_query_block) <= MEM_TURN_ROWS*QK8_0*sizeof(float), "no room");
        if (key->type == GGML_TYPE_Q8_0) {
            for (int64_t i = 0; i < n_q*key->ne[0]; i += QK8_0) {
                ((mem_query_block *) work)[i/QK8_0].set([&](int64_t c) { return _mm512_loadu_ps(q + i + c); });
            }
        }
    }

    static void dot(const ggml_tensor * key, int64_t i0, int64_t n, const float * q, int64_t n_q, const float * work, float * s) {
        if (key->type != GGML_TYPE_Q8_0) {
            mem_kernels_avx512::dot(key, i0, n, q, n_q, work, s);
            return;
        }
        const int64_t d = key->ne[0];
        const char * rows = (const char *) key->data + i0*key->nb[1];
        mem_by_four(n_q, [&](auto nq, int64_t j) {
            mem_dot_vnni<nq>(n, d, rows, key->nb[1], (const mem_query_block *) work + j*d/QK8_0, s + j*MEM_TILE_ROWS);
        });
    }

    static void weigh(const ggml_tensor * value, int64_t i0, int64_t n, const float * s, int64_t n_q, float * o) {
        if (value->type != GGML_TYPE_Q8_0) {
            mem_kernels_avx512::weigh(value, i0, n, s, n_q, o);
            return;
        }
        const int64_t d = value->ne[0];
        const char * rows = (const char *) value->data + i0*value->nb[1];
        mem_by_four(n_q, [&](auto nq, int64_t j) {
            mem_weigh_vnni<nq>(n, d, s + j*MEM_TILE_ROWS, rows, value->nb[1], o + j*d);
        });
    }
};
