// out = origin + (sum_t w_t (W_t - origin)) / divisor, origin = W_0 or 0. Source: Task Arithmetic, arXiv 2212.04089.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/matrix_view.h"

namespace pymerge {

struct CombineParams {
    Output out;
    MatrixView base;  // data null: origin 0
    const MatrixView* inputs;
    const double* weights;
    double divisor;
    std::int64_t count;  // T
    std::int64_t numel;  // elements of every tensor, contiguous
};

// One task's share. Fused multiply-add with one rounding, which is what PyTorch's add_(..., alpha=w) computes.
template <class A>
PM_HOST_DEVICE A combine_step(A total, A value, A origin, A weight) {
    return std::fma(weight, value - origin, total);
}

// Accumulates in double if any tensor is float64, else in float.
inline bool combine_in_double(const CombineParams& p) {
    return is_double(p.base) || std::any_of(p.inputs, p.inputs + p.count, is_double);
}

void combine_cpu(const CombineParams& p, int threads);

}  // namespace pymerge
