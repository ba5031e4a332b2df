// How many |tau_t| have each value of a digit of their bits. Source: the trim step of TIES-Merging, arXiv 2306.01708.
#pragma once

#include "common/matrix_view.h"

namespace pymerge {

struct MagnitudeCountsParams {
    std::int64_t* counts;  // [count, 2^bits], zeros at first
    MatrixView base;       // one row of numel elements, as the experts
    const MatrixView* experts;
    const std::uint64_t* prefixes;  // only keys that start with it count
    int shift;                      // the digit: bits shift to shift + bits - 1
    int bits;
    bool in_double;  // keys are those of double, whatever type the deltas are formed in
    std::int64_t count;
    std::int64_t numel;
};

void magnitude_counts_cpu(const MagnitudeCountsParams& p, int threads);

// The index behind the left-th element with this key; the number of elements where there are not so many.
std::int64_t magnitude_place_cpu(const MatrixView& base, const MatrixView& expert, std::uint64_t key, std::int64_t left,
                                 std::int64_t numel);

}  // namespace pymerge
