// Statistics of task vectors tau_t = W_t - W_0, straight from the stored types.
#pragma once

#include <cstdint>

#include "common/matrix_view.h"

namespace pymerge {

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

void task_stats_cpu(const TaskStatsParams& p, int threads);

}  // namespace pymerge
