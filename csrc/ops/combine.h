// out = origin + (sum_t w_t (W_t - origin)) / divisor, origin = W_0 or 0. Source: Task Arithmetic, arXiv 2212.04089.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

struct CombineParams {
    void* out;
    DType out_dtype;
    const void* base;  // null: origin 0
    DType base_dtype;
    const void* const* inputs;
    const DType* dtypes;
    const double* weights;
    double divisor;
    std::int64_t count;  // T
    std::int64_t numel;  // elements of every tensor, contiguous
};

// One task's share. Fused multiply-add with one rounding, which is what PyTorch's add_(..., alpha=w) computes.
template <class A>
PM_HOST_DEVICE A combine_step(A total, A value, A origin, A weight) {
#if defined(__CUDA_ARCH__)
    return ::fma(weight, value - origin, total);
#else
    return std::fma(weight, value - origin, total);
#endif
}

// Accumulates in double if any tensor is float64, else in float.
inline bool combine_in_double(const CombineParams& p) {
    if (p.base != nullptr && p.base_dtype == DType::f64) return true;
    return std::any_of(p.dtypes, p.dtypes + p.count, [](DType dtype) { return dtype == DType::f64; });
}

void combine_cpu(const CombineParams& p, int threads);
void combine_cuda(const CombineParams& p, void* stream);

}  // namespace pymerge
