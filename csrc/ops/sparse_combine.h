// out = W_0 + scale sum_t v_t, v_t = s_t m_t (W_t - W_0), with or without an election of signs. Source: TIES-Merging,
// arXiv 2306.01708, with mergekit's weights in the election.
#pragma once

#include "ops/magnitude_mask.h"

namespace pymerge {

struct SparseCombineParams {
    Output out;
    MatrixView base;  // one row of numel elements, as the experts
    const MatrixView* experts;
    const std::uint8_t* bits;  // count rows of mask_bytes(numel); null: as the selections say
    Selection kept;            // keys null: all elements
    Selection dropped;         // of those kept; keys null: nothing
    const double* sizes;       // [count]: s_t, weight times what rescales the task vector
    const double* weights;     // [count]: what `normalize` adds up
    std::int64_t count;
    std::int64_t numel;
    bool elect;
    bool normalize;
    double scale;
};

// Whether a value takes part: its sign is that of the sum of all values; the sign of 0 is plus.
template <class A>
PM_HOST_DEVICE A sparse_agrees(A value, A vote) {
    // Of a NaN neither holds. Without a branch, so that loops vectorise.
    const bool up = vote >= A(0);
    const bool agrees = (up & (value > A(0))) | (!up & (value < A(0)));
    return agrees ? A(1) : A(0);
}

void sparse_combine_cpu(const SparseCombineParams& p, int threads);

}  // namespace pymerge
