// Sums and statistics of task vectors tau_t = W_t - W_0, straight from the stored types.
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

struct TaskStatsParams {
    double* norms;   // [count]: sum of squares of tau
    double* traces;  // [count]: the same after subtracting the column means
    float* means;    // count x columns, contiguous
    MatrixView base;
    const MatrixView* experts;
    std::int64_t count;
    std::int64_t rows;
    std::int64_t columns;
};

PM_HOST_DEVICE float task_delta(float value, float base) { return value - base; }

// out = W_t - W_0 of `n` elements from `begin` on, of tensors that are seen as one row; W_t where the base is null.
void task_deltas(float* out, const MatrixView& base, const MatrixView& expert, std::int64_t begin, std::int64_t n);
void task_sum_cpu(const TaskSumParams& p, int threads);
void task_stats_cpu(const TaskStatsParams& p, int threads);

}  // namespace pymerge
