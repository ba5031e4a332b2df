// Random masks of task vectors by Philox: one probability for all elements (DARE, arXiv 2311.03099), or one that grows
// with the rank of |W_t - W_0| in its row (DELLA-Merging, arXiv 2406.11617); and L1 norms before and after.
#pragma once

#include "ops/magnitude_mask.h"

namespace pymerge {

struct RandomMaskParams {
    MaskOutput out;
    MatrixView base;  // one row of rows * columns elements, as the experts
    const MatrixView* experts;
    const double* lowest;   // [count]: probability of the smallest element of a row
    const double* highest;  // [count]: of the largest
    const std::uint64_t* keys;
    std::int64_t count;
    std::int64_t first;  // number of the first element, a multiple of 4
    std::int64_t rows;
    std::int64_t columns;
};

// Numbers below it are a probability's share of 2^32.
PM_HOST_DEVICE std::uint64_t random_limit(double probability) {
    return static_cast<std::uint64_t>(probability * 4294967296.0);
}

void random_mask_cpu(const RandomMaskParams& p, int threads);

}  // namespace pymerge
