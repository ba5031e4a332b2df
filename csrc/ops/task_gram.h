// S = sum_t w_t tau~_t^T tau~_t, straight from W_t and W_0. WUDI-Merging (arXiv 2503.08099), ACE-Merging (2603.02945).
#pragma once

#include <cstdint>

#include "ops/task_vector.h"

namespace pymerge {

struct TaskGramParams {
    float* out;  // columns x columns, contiguous
    MatrixView base;
    const MatrixView* experts;
    const double* weights;
    const float* means;  // count x columns, contiguous, or null
    std::int64_t count;  // T
    std::int64_t rows;
    std::int64_t columns;
};

void task_gram_cuda(const TaskGramParams& p, void* stream);

}  // namespace pymerge
