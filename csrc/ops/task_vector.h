// tau_t = W_t - W_0 (minus its column mean) in float32, and its statistics, straight from the stored types.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

// A matrix whose rows are contiguous; float32, float16 or bfloat16.
struct MatrixView {
    const void* data;
    DType dtype;
    std::int64_t row_stride;  // elements
};

struct TaskVectorParams {
    float* out;  // rows x columns, contiguous
    MatrixView base;
    MatrixView expert;
    const float* mean;  // columns values, or null
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

void task_vector_cpu(const TaskVectorParams& p, int threads);
void task_stats_cpu(const TaskStatsParams& p, int threads);

}  // namespace pymerge
