// The search of a table of a memory for the entries with the largest scale*key*q + bias: lists, HNSW, or a scan
#pragma once

#include "mem-args.h"
#include "mem-rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

// number of candidates that a walk for the best of n entries keeps on level 0, for a recall@1 of 0.98 (bench/lookup.py)
static size_t mem_hnsw_ef(int64_t n) { return n <= 4096 ? 16 : n <= 16384 ? 24 : 48; }

// for tokens: keys are harder to find than centroids, because queries are not distributed like them
constexpr int64_t MEM_HNSW_EF_TOKEN = 64;

// number of walks that take turns in a thread
constexpr int64_t MEM_HNSW_TURNS = 8;

struct mem_candidate {
    float   score;
    int32_t entry;    // of the head
    bool    expanded; // HNSW: its links have been scored

    mem_candidate(float score = -INFINITY, int32_t entry = 0) : score(score), entry(entry), expanded(false) {}
};

// the best candidates of a search, the best first
struct mem_best : std::vector<mem_candidate> {
    size_t limit;

    // where it is among them, or -1
    int64_t keep(float score, int32_t entry) {
        if (size() == limit) {
            if (score <= back().score) {
                return -1;
            }
            pop_back();
        }
        size_t at = size();
        while (at > 0 && (*this)[at - 1].score < score) {
            at--;
        }
        insert(begin() + at, mem_candidate(score, entry));
        return at;
    }
};

// the search of one query
struct mem_search {
    const mem_args * a;
    int64_t       h;
    const float * q;

    const char    * key;            // of the head
    const float   * bias;
    const int32_t * link0;

    mem_best             found;
    mem_best             lists;     // to be searched
    std::vector<int32_t> next;      // HNSW: entries to be scored
    std::vector<float>   score;
    int64_t              n_next;

    // HNSW
    int32_t               level;
    mem_candidate         best;     // above level 0
    int64_t               first;    // no candidate before this one is to be expanded
    std::vector<uint64_t> visited;  // a bit per entry

    void set(const mem_args & args, int64_t head, const float * query) {
        a = &args;
        h = head;
        q = query;

        key   = (const char *) a->key->data + a->offset[h]*a->key->nb[1];
        bias  = (const float *) a->bias->data + a->offset[h];
        link0 = a->link0 ? a->link0 + a->offset[h]*a->m0 : nullptr;

        level  = 0;
        first  = 0;
        n_next = 0;
        found.clear();
        found.limit = a->top_k;
        next .resize(std::max({ a->m0, a->m, MEM_TILE_ROWS }));
        score.resize(next.size());
    }

    // scale*row*q + bias of n rows
    template <typename F>
    void score_rows(const ggml_tensor * table, const char * rows, const float * row_bias, int64_t n, F index) {
        mem_by_type(table, [&](auto type) {
            mem_by_four(n, [&](auto nr, int64_t i) {
                const char * at[nr];
                for (int r = 0; r < nr; r++) {
                    at[r] = rows + index(i + r)*table->nb[1];
                }
                mem_dot<decltype(type), nr, 1>(a->n_embd_k, at, q, score.data() + i);
            });
        });
        for (int64_t i = 0; i < n; i++) {
            score[i] = score[i]*a->scale + row_bias[index(i)];
        }
    }

    // the scores of a tile of n rows from i0 on
    void keep_tile(mem_best & best, int64_t i0, int64_t n) {
        if (best.size() == best.limit) {
            std::fill(score.begin() + n, score.begin() + MEM_TILE_ROWS, -INFINITY);
            if (mem_tile_max(score.data()) <= best.back().score) {
                return;
            }
        }
        for (int64_t i = 0; i < n; i++) {
            best.keep(score[i], i0 + i);
        }
    }

    // all entries from i0 to i1 - 1
    void scan(int64_t i0, int64_t i1) {
        for (; i0 < i1; i0 += MEM_TILE_ROWS) {
            const int64_t n = std::min(MEM_TILE_ROWS, i1 - i0);
            score_rows(a->key, key, bias, n, [&](int64_t i) { return i0 + i; });
            keep_tile(found, i0, n);
        }
    }

    // the lists with the largest scores
    void find_lists() {
        lists.clear();
        lists.limit = a->n_probe;
        for (int64_t c = a->list_offset[h]; c < a->list_offset[h + 1]; c += MEM_TILE_ROWS) {
            const int64_t n = std::min<int64_t>(MEM_TILE_ROWS, a->list_offset[h + 1] - c);
            score_rows(a->list_key, (const char *) a->list_key->data, a->list_bias, n, [&](int64_t i) { return c + i; });
            keep_tile(lists, c, n);
        }
        for (const auto & list : lists) {
            const int64_t i0 = a->list[list.entry] - a->offset[h];
            const int64_t n  = a->list[list.entry + 1] - a->list[list.entry];
            mem_prefetch<MEM_CACHE_L2>(key + i0*a->key->nb[1], n*a->key->nb[1]); // together they are larger than L1
            mem_prefetch(bias + i0, n*sizeof(float));
        }
    }

    void scan_lists() {
        for (const auto & list : lists) {
            scan(a->list[list.entry] - a->offset[h], a->list[list.entry + 1] - a->offset[h]);
        }
    }

    //
    // Malkov, Yashunin: Efficient and robust approximate nearest neighbor search using HNSW graphs, algorithms 2 and 5
    //

    void begin() {
        found.limit = a->kind == GGML_MEM_TOKEN ? std::max(MEM_HNSW_EF_TOKEN, 2*a->top_k) : mem_hnsw_ef(a->n(h));
        next[0] = a->entry[h];
        n_next  = 1;
        score_next();
        best  = { score[0], next[0] };
        level = n_levels(best.entry);
        if (level == 0) {
            descend();
        }
        ask();
    }

    void score_next() {
        score_rows(a->key, key, bias, n_next, [&](int64_t i) { return next[i]; });
    }

    int32_t n_levels(int32_t i) const { return a->upper[a->offset[h] + i + 1] - a->upper[a->offset[h] + i]; }

    // to level 0
    void descend() {
        visited.assign(a->n(h)/64 + 1, 0);
        visit(best.entry);
        found.assign(1, best);
    }

    // whether this is the first time
    bool visit(int32_t i) {
        const uint64_t old = visited[i/64];
        visited[i/64] = old | uint64_t(1) << i%64;
        return !(old >> i%64 & 1);
    }

    // the entries to be scored next, on level 0 the links of the best candidate that has not been expanded: false if there is none
    bool ask() {
        n_next = 0;
        if (level > 0) {
            const int32_t * link = a->link + (int64_t) (a->upper[a->offset[h] + best.entry] + level - 1)*a->m;
            for (int64_t j = 0; j < a->m && link[j] >= 0; j++) {
                next[n_next++] = link[j];
            }
        } else {
            while (first < (int64_t) found.size() && found[first].expanded) {
                first++;
            }
            if (first == (int64_t) found.size()) {
                return false;
            }
            found[first].expanded = true;
            const int32_t * link = link0 + found[first].entry*a->m0;
            for (int64_t j = 0; j < a->m0 && link[j] >= 0; j++) {
                next[n_next] = link[j];
                n_next += visit(link[j]);
            }
        }
        for (int64_t i = 0; i < n_next; i++) {
            mem_prefetch(key + next[i]*a->key->nb[1], a->key->nb[1]);
            mem_prefetch(bias + next[i], sizeof(float));
        }
        return true;
    }

    // the entries that were asked for have arrived
    void answer() {
        score_next();
        if (level == 0) {
            for (int64_t i = 0; i < n_next; i++) {
                const int64_t at = found.keep(score[i], next[i]);
                if (at >= 0) {
                    first = std::min(first, at);
                    mem_prefetch(link0 + next[i]*a->m0, a->m0*sizeof(int32_t)); // it is likely to be expanded
                }
            }
            return;
        }
        const auto top = std::max_element(score.begin(), score.begin() + n_next);
        if (n_next > 0 && *top > best.score) {
            best = { *top, next[top - score.begin()] };
        } else if (--level == 0) {
            descend();
        }
    }
};

// searches of consecutive queries, numbered KV head by KV head
struct mem_searches {
    std::vector<mem_search> search;

    // queries i0 .. i1 - 1 of heads that have a search
    void run(const mem_args & a, int64_t i0, int64_t i1) {
        const int64_t n_q = a.n_gqa*a.n_tokens;
        auto each = [&](auto f) {
            for (int64_t i = i0; i < i1; i++) {
                if (a.use_search(i/n_q)) {
                    f(search[i - i0]);
                }
            }
        };

        search.resize(std::max<size_t>(search.size(), i1 - i0));
        for (int64_t i = i0; i < i1; i++) {
            search[i - i0].set(a, i/n_q, a.query(i/n_q, i%n_q));
        }

        // all of them step by step, so that the rows that one asks for arrive while others score theirs
        if (a.list) {
            each([](mem_search & s) { s.find_lists(); });
            each([](mem_search & s) { s.scan_lists(); });
            return;
        }
        each([](mem_search & s) { s.begin(); });
        for (bool more = a.link0; more; ) {
            more = false;
            each([&](mem_search & s) {
                s.answer();
                more = s.ask() || more;
            });
        }
    }
};
