// The search of a table of a memory for the entries with the largest scale*key*q + bias: HNSW, or exact where there is no graph
#pragma once

#include "mem-args.h"
#include "mem-rows.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

// number of candidates that a search for the best of n entries keeps on level 0, for a recall@1 of 0.98 (bench/lookup.py)
static size_t mem_hnsw_ef(int64_t n) { return n <= 4096 ? 16 : n <= 16384 ? 24 : 48; }

// for tokens: keys are harder to find than centroids, because queries are not distributed like them
constexpr size_t MEM_HNSW_EF_TOKEN = 64;

// number of searches that take turns in a thread
constexpr int64_t MEM_HNSW_TURNS = 8;

struct mem_candidate {
    float   score;
    int32_t entry;    // of the head
    bool    expanded; // HNSW: its links have been scored

    mem_candidate(float score = -INFINITY, int32_t entry = 0) : score(score), entry(entry), expanded(false) {}
};

// the search of one query for the entries with the largest scale*key*q + bias
struct mem_search {
    const mem_args * a;
    int64_t       h;
    const float * q;
    float         scale;
    size_t        ef;               // how many candidates are kept

    const char    * key;            // of the head
    const float   * bias;
    const int32_t * link0;          // nullptr: there is no graph

    std::vector<mem_candidate> found;   // the best first
    std::vector<int32_t>       next;    // entries to be scored
    std::vector<float>         score;
    int64_t                    n_next;

    // HNSW
    int32_t               level;
    mem_candidate         best;     // above level 0
    size_t                first;    // no candidate before this one is to be expanded
    std::vector<uint64_t> visited;  // a bit per entry

    void set(const mem_args & args, int64_t head, const float * query, float factor, size_t size) {
        a     = &args;
        h     = head;
        q     = query;
        scale = factor;
        ef    = size;

        key   = (const char *) a->key->data + a->offset[h]*a->key->nb[1];
        bias  = (const float *) a->bias->data + a->offset[h];
        link0 = a->link0 ? a->link0 + a->offset[h]*a->m0 : nullptr;

        level  = 0;
        first  = 0;
        n_next = 0;
        found.clear();
        next .resize(std::max({ a->m0, a->m, MEM_TILE_ROWS }));
        score.resize(next.size());
    }

    void score_next() {
        mem_by_type(a->key, [&](auto type) {
            mem_by_four(n_next, [&](auto nr, int64_t i) {
                const char * rows[nr];
                for (int r = 0; r < nr; r++) {
                    rows[r] = key + next[i + r]*a->key->nb[1];
                }
                mem_dot<decltype(type), nr, 1>(a->n_embd_k, rows, q, score.data() + i);
            });
        });
        for (int64_t i = 0; i < n_next; i++) {
            score[i] = score[i]*scale + bias[next[i]];
        }
    }

    void keep_next() {
        for (int64_t i = 0; i < n_next; i++) {
            if (found.size() == ef) {
                if (score[i] <= found.back().score) {
                    continue;
                }
                found.pop_back();
            }
            size_t at = found.size();
            while (at > 0 && found[at - 1].score < score[i]) {
                at--;
            }
            found.insert(found.begin() + at, mem_candidate(score[i], next[i]));
            first = std::min(first, at);
            mem_prefetch(link0 + next[i]*a->m0, a->m0*sizeof(int32_t)); // it is likely to be expanded
        }
    }

    void scan() {
        for (int64_t i0 = 0; i0 < a->n(h); i0 += MEM_TILE_ROWS) {
            n_next = std::min(MEM_TILE_ROWS, a->n(h) - i0);
            std::iota(next.begin(), next.begin() + n_next, i0);
            score_next();
            keep_next();
        }
    }

    //
    // Malkov, Yashunin: Efficient and robust approximate nearest neighbor search using HNSW graphs, algorithms 2 and 5
    //

    void begin() {
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
            while (first < found.size() && found[first].expanded) {
                first++;
            }
            if (first == found.size()) {
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
            keep_next();
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

    // queries i0 .. i1 - 1 where the table has a graph; in turns, so that the rows that one asks for arrive while others score theirs
    // ef: 0 is what it takes to find the best one
    void hnsw(const mem_args & a, int64_t i0, int64_t i1, float scale, size_t ef = 0) {
        const int64_t n_q = a.n_gqa*a.n_tokens;
        search.resize(std::max<size_t>(search.size(), i1 - i0));
        for (int64_t i = i0; i < i1; i++) {
            const int64_t h = i/n_q;
            search[i - i0].set(a, h, a.query(h, i%n_q), scale, ef ? ef : mem_hnsw_ef(a.n(h)));
            if (a.use_hnsw(h)) {
                search[i - i0].begin();
            }
        }
        for (bool more = true; more; ) {
            more = false;
            for (int64_t i = i0; i < i1; i++) {
                search[i - i0].answer();
                more = search[i - i0].ask() || more;
            }
        }
    }
};
