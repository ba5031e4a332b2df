// Weighted sums of task vectors tau_t = W_t - W_0, straight from the stored types.
#pragma once

#include <cstdint>

#include "common/matrix_view.h"

namespace pymerge {

struct TaskSumParams {
    Output out;  // rows x columns, contiguous: sum_t w_t (W_t - W_0 - 1 mu_t^T), in float32 or float64
    MatrixView base;
    const MatrixView* experts;
    const double* weights;
    const void* means;  // count x columns as `out`, contiguous, or null
    std::int64_t count;
    std::int64_t rows;
    std::int64_t columns;
};

void task_sum_cpu(const TaskSumParams& p, int threads);

}  // namespace pymerge
