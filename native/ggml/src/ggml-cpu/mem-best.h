// The best of the entries that a search has scored
#pragma once

#include "mem-kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

struct mem_candidate {
    float   score;
    int32_t entry;    // of the head
    bool    expanded; // HNSW: its links have been scored

    mem_candidate(float score = -INFINITY, int32_t entry = 0) : score(score), entry(entry), expanded(false) {}
};

// at most limit candidates, the best first
struct mem_best : std::vector<mem_candidate> {
    size_t limit;

    // a score must be above it to be kept
    float bound() const { return size() < limit ? -INFINITY : back().score; }

    // returns the rank of the entry, or -1 if it is not kept
    int64_t keep(float score, int32_t entry) {
        if (!(score > bound())) {
            return -1;
        }
        if (size() < limit) {
            emplace_back();
        }
        size_t rank = size() - 1;
        while (rank > 0 && (*this)[rank - 1].score < score) {
            (*this)[rank] = (*this)[rank - 1];
            rank--;
        }
        (*this)[rank] = { score, entry };
        return rank;
    }
};

// a lower bound on the k-th largest of n scores; for large n and small k it is tight: few other scores exceed it
static float mem_bound_of_best(const float * x, int64_t n, int64_t k) {
    constexpr int LANES = 32;
    if (k > LANES) {
        return -INFINITY;
    }
    float max[LANES];
    mem_max_lanes<LANES>(x, n, max);

    int n_above[LANES] = {}; // vectorized, which a selection is not
    for (int i = 0; i < LANES; i++) {
        for (int l = 0; l < LANES; l++) {
            n_above[l] += max[i] >= max[l];
        }
    }
    float bound = -INFINITY;
    for (int l = 0; l < LANES; l++) {
        bound = n_above[l] >= k ? std::max(bound, max[l]) : bound;
    }
    return bound;
}
