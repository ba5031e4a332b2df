// X of X (S + 1 c) = R for a batch of small symmetric positive definite S. ACE-Merging (arXiv 2603.02945), closed form.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

struct SpdSolveParams {
    void* X;               // layers x rows x columns, as R
    void* conditions;      // layers: estimates of the condition number of S
    std::int32_t* minors;  // layers: 0, or the size of the first leading minor that is not positive; X is unset then
    const void* S;         // layers x columns x columns; the lower triangle is read
    const void* R;
    const void* prior;  // c, layers x columns, or null
    const void* start;  // columns: where power iterations start, of length 1
    DType dtype;        // float32 or float64, of all but the minors
    std::int64_t layers;
    std::int64_t rows;
    std::int64_t columns;  // at most spd_solve_columns
    int iterations;        // of the estimates
};

// A factor lies in a block's shared memory as a packed triangle: what 48 KiB, which need no opting in, hold of it.
constexpr std::int64_t spd_solve_columns(DType dtype) { return dtype == DType::f64 ? 88 : 128; }

void spd_solve_cuda(const SpdSolveParams& p, void* stream);

}  // namespace pymerge
