// The search of a table of a memory for the entries with the largest scale*key*q + bias: lists, HNSW, or a scan
#pragma once

#include "mem-args.h"
#include "mem-best.h"
#include "mem-kernels.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

// candidates that a walk keeps on level 0 of a graph of n entries, for a recall@1 of 0.98 (bench/speed/search.py)
static size_t mem_hnsw_ef(int64_t n) { return n <= 4096 ? 16 : n <= 16384 ? 24 : 48; }

// for tokens: keys are harder to find than centroids, because queries have another distribution
constexpr int64_t MEM_HNSW_EF_TOKEN = 64;

// searches that take turns in a thread
constexpr int64_t MEM_HNSW_TURNS = 8;

// a search scores rows of 8 bits by the query in 8 bits; this many more entries than the result needs are then scored by the query itself
constexpr int64_t MEM_SPARE = 1;

// the rows of a list are fetched this many lists before they are scored
constexpr size_t MEM_LISTS_AHEAD = 4;

struct mem_span {
    const char * data;
    size_t       size;
};

// the search of one query
struct mem_search {
    const mem_args * a;
    int64_t       h;
    const float * q;

    const float   * bias;
    const int32_t * link0;          // of the head

    mem_best             top;       // the result
    int64_t              n_scored;  // entries and lists
    std::vector<int32_t> lists;     // to be searched
    std::vector<int32_t> next;      // HNSW: entries to be scored
    std::vector<float>   score;
    int64_t              n_next;

    std::vector<block_q8_0> q_rounded;

    // HNSW
    int32_t               level;
    mem_candidate         best;     // above level 0
    int64_t               first;    // no candidate before this one is to be expanded
    std::vector<uint64_t> visited;  // a bit per entry

    void set(const mem_args & args, int64_t head, const float * query) {
        a = &args;
        h = head;
        q = query;

        bias  = (const float *) a->bias->data;
        link0 = a->link0 ? a->link0 + a->offset[h]*a->m0 : nullptr;

        level  = 0;
        first  = 0;
        n_next = 0;
        n_scored = 0;
        top.clear();
        top.limit = a->top_k;
        next .resize(std::max(a->m0, a->m));
        score.resize(std::max(score.size(), next.size()));
    }

    // to 8 bits, for rows of 8 bits
    void round_query() {
        q_rounded.resize(a->n_embd_k/QK8_0);
        quantize_row_q8_0(q, q_rounded.data(), q_rounded.size()*QK8_0);
    }

    // calls visit(i, scale*row*q + bias) for n rows, which are the rows row(i) of the table
    // rounded: score rows of 8 bits by the query in 8 bits
    template <typename R, typename V>
    void score_rows(const ggml_tensor * table, const float * row_bias, int64_t n, bool rounded, R row, V visit) const {
        const float scale = a->scale;
        auto score_by = [&](auto dot) {
            mem_by_four(n, [&](auto nr, int64_t i) {
                const char * rows[nr];
                float sum[nr];
                for (int r = 0; r < nr; r++) {
                    rows[r] = (const char *) table->data + row(i + r)*table->nb[1];
                }
                dot(nr, rows, sum);
                for (int r = 0; r < nr; r++) {
                    visit(i + r, sum[r]*scale + row_bias[row(i + r)]);
                }
            });
        };
        if (rounded && table->type == GGML_TYPE_Q8_0) {
            score_by([&](auto nr, const char * const * rows, float * sum) { mem_kernels::dot_q8_0<nr>(a->n_embd_k, rows, q_rounded.data(), sum); });
        } else {
            mem_by_type(table, [&](auto type) {
                score_by([&](auto nr, const char * const * rows, float * sum) { mem_dot<decltype(type), nr, 1>(a->n_embd_k, rows, q, sum); });
            });
        }
    }

    // scores the rows i0 .. i1 - 1 of the table, which are entries of the head; calls before(i) for each
    template <typename F>
    void scan_rows(int64_t i0, int64_t i1, bool rounded, F before) {
        const int64_t first = i0 - a->offset[h];
        n_scored += i1 - i0;
        float bound = top.bound();
        score_rows(a->key, bias, i1 - i0, rounded, [&](int64_t i) { return i0 + i; }, [&](int64_t i, float x) {
            before(i);
            if (x > bound) {
                top.keep(x, first + i);
                bound = top.bound();
            }
        });
    }

    // scores all entries
    void scan() {
        scan_rows(a->offset[h], a->offset[h + 1], false, [](int64_t) {});
    }

    // scores the result of a search by the query itself
    void rescore() {
        if (top.empty()) {
            top.emplace_back(); // the query has a number that is not finite, or too large for 8 bits
        }
        if (a->key->type == GGML_TYPE_Q8_0) { // other rows were scored by the query itself
            score_rows(a->key, bias, top.size(), false,
                [&](int64_t i) { return a->offset[h] + top[i].entry; },
                [&](int64_t i, float x) { top[i].score = x >= -INFINITY ? x : -INFINITY; }); // no NaN, which cannot be sorted
            std::sort(top.begin(), top.end(), [](const mem_candidate & x, const mem_candidate & y) { return x.score > y.score; });
        }
        for (size_t i = 0; i < std::min<size_t>(a->top_k, top.size()); i++) {
            const int64_t row = a->offset[h] + top[i].entry; // is read next
            mem_prefetch((const char *) a->value->data + row*a->value->nb[1], a->value->nb[1]);
            if (a->lse) {
                mem_prefetch((const float *) a->lse->data + row, sizeof(float));
            }
        }
    }

    // the n_probe lists with the largest scores
    void find_lists() {
        top.limit = a->top_k + MEM_SPARE;

        const int64_t first = a->list_offset[h];
        const int64_t n     = a->list_offset[h + 1] - first;
        score.resize(std::max<size_t>(score.size(), n));
        n_scored += n;
        score_rows(a->list_key, a->list_bias, n, true, [&](int64_t i) { return first + i; }, [&](int64_t i, float x) { score[i] = x; });

        const float bound = mem_bound_of_best(score.data(), n, a->n_probe);
        lists.resize(n);
        size_t n_best = 0;
        for (int64_t i = 0; i < n; i++) { // no branches
            lists[n_best] = first + i;
            n_best += score[i] >= bound;
        }
        lists.resize(n_best);

        auto better = [&](int32_t x, int32_t y) { return score[x - first] > score[y - first]; };
        if ((int64_t) n_best > a->n_probe) {
            std::nth_element(lists.begin(), lists.begin() + a->n_probe, lists.end(), better);
            lists.resize(a->n_probe);
        }
        if (n_best > 0) {
            std::iter_swap(lists.begin(), std::min_element(lists.begin(), lists.end(), better)); // the best one first
        }
        for (int32_t l : lists) {
            for (mem_span m : { list_rows(l), list_bias(l) }) {
                // so that the addresses are translated before all of it is fetched
                mem_prefetch<MEM_CACHE_L2>(m.data, 1);
                mem_prefetch<MEM_CACHE_L2>(m.data + m.size - 1, 1);
            }
        }
    }

    mem_span list_rows(int32_t l) const {
        return { (const char *) a->key->data + a->list[l]*a->key->nb[1], (a->list[l + 1] - a->list[l])*a->key->nb[1] };
    }

    mem_span list_bias(int32_t l) const {
        return { (const char *) (bias + a->list[l]), (a->list[l + 1] - a->list[l])*sizeof(float) };
    }

    // scores the entries of a list; meanwhile the rows of a later list are fetched at the same pace
    void scan_list(int32_t l, mem_span next) {
        const size_t step = 4*a->key->nb[1];
        scan_rows(a->list[l], a->list[l + 1], true, [&](int64_t i) {
            if (i%4 == 0) {
                const size_t size = std::min(next.size, step);
                mem_prefetch<MEM_CACHE_L2>(next.data, size);
                next = { next.data + size, next.size - size };
            }
        });
        mem_prefetch<MEM_CACHE_L2>(next.data, next.size);
    }

    //
    // Malkov, Yashunin: Efficient and robust approximate nearest neighbor search using HNSW graphs, algorithms 2 and 5
    //

    void begin() {
        top.limit = a->kind == GGML_MEM_TOKEN ? std::max(MEM_HNSW_EF_TOKEN, 2*a->top_k) : mem_hnsw_ef(a->n(h));
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
        n_scored += n_next;
        score_rows(a->key, bias, n_next, true,
            [&](int64_t i) { return a->offset[h] + next[i]; }, [&](int64_t i, float x) { score[i] = x; });
    }

    int32_t n_levels(int32_t i) const { return a->upper[a->offset[h] + i + 1] - a->upper[a->offset[h] + i]; }

    // begins on level 0
    void descend() {
        visited.assign(a->n(h)/64 + 1, 0);
        visit(best.entry);
        top.assign(1, best);
    }

    // marks an entry as visited; returns whether it was not
    bool visit(int32_t i) {
        const uint64_t old = visited[i/64];
        visited[i/64] = old | uint64_t(1) << i%64;
        return !(old >> i%64 & 1);
    }

    // asks for the entries to be scored next: on level 0 the links of the best candidate that is not expanded
    // returns false if all candidates are expanded
    bool ask() {
        n_next = 0;
        if (level > 0) {
            const int32_t * link = a->link + (int64_t) (a->upper[a->offset[h] + best.entry] + level - 1)*a->m;
            for (int64_t j = 0; j < a->m && link[j] >= 0; j++) {
                next[n_next++] = link[j];
            }
        } else {
            while (first < (int64_t) top.size() && top[first].expanded) {
                first++;
            }
            if (first == (int64_t) top.size()) {
                return false;
            }
            top[first].expanded = true;
            const int32_t * link = link0 + top[first].entry*a->m0;
            for (int64_t j = 0; j < a->m0 && link[j] >= 0; j++) {
                next[n_next] = link[j];
                n_next += visit(link[j]);
            }
        }
        for (int64_t i = 0; i < n_next; i++) {
            const int64_t row = a->offset[h] + next[i];
            mem_prefetch((const char *) a->key->data + row*a->key->nb[1], a->key->nb[1]);
            mem_prefetch(bias + row, sizeof(float));
        }
        return true;
    }

    // scores the entries that ask has asked for, which have arrived
    void answer() {
        score_next();
        if (level == 0) {
            for (int64_t i = 0; i < n_next; i++) {
                const int64_t rank = top.keep(score[i], next[i]);
                if (rank >= 0) {
                    first = std::min(first, rank);
                    mem_prefetch(link0 + next[i]*a->m0, a->m0*sizeof(int32_t)); // it is likely to be expanded
                }
            }
            return;
        }
        const auto max = std::max_element(score.begin(), score.begin() + n_next);
        if (n_next > 0 && *max > best.score) {
            best = { *max, next[max - score.begin()] };
        } else if (--level == 0) {
            descend();
        }
    }
};

// searches of consecutive queries, numbered KV head by KV head
struct mem_searches {
    std::vector<mem_search> search;
    std::vector<std::pair<mem_search *, int32_t>> todo; // lists to be scanned
    int64_t n_scored = 0; // entries and lists, in all runs

    // searches for the queries i0 .. i1 - 1, as far as their heads have a search
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

        // all of them in steps, so that the rows that one asks for arrive while others score theirs
        each([](mem_search & s) { s.round_query(); });
        if (a.list) {
            each([](mem_search & s) { s.find_lists(); });
            scan_lists(each);
        } else {
            each([](mem_search & s) { s.begin(); });
            for (bool more = a.link0; more; ) {
                more = false;
                each([&](mem_search & s) {
                    s.answer();
                    more = s.ask() || more;
                });
            }
        }
        each([&](mem_search & s) {
            s.rescore();
            n_scored += s.n_scored;
        });
    }

    // scans the lists of all searches, one after another
    template <typename F>
    void scan_lists(F each) {
        todo.clear();
        each([&](mem_search & s) {
            for (int32_t l : s.lists) {
                todo.emplace_back(&s, l);
            }
        });
        auto fetch = [](mem_span m) { mem_prefetch<MEM_CACHE_L2>(m.data, m.size); };

        for (size_t i = 0; i < std::min(MEM_LISTS_AHEAD, todo.size()); i++) {
            const auto & [s, l] = todo[i];
            fetch(s->list_rows(l));
            fetch(s->list_bias(l));
        }
        for (size_t i = 0; i < todo.size(); i++) {
            mem_span next = { nullptr, 0 };
            if (i + MEM_LISTS_AHEAD < todo.size()) {
                const auto & [s, l] = todo[i + MEM_LISTS_AHEAD];
                next = s->list_rows(l);
                fetch(s->list_bias(l));
            }
            todo[i].first->scan_list(todo[i].second, next);
        }
    }
};
