// S = sum_t w_t tau~_t^T tau~_t, straight from W_t and W_0. WUDI-Merging (arXiv 2503.08099), ACE-Merging (2603.02945).
#pragma once

#include <cstdint>

#include "common/task_delta.h"

namespace pymerge {

// The matrix of every layer of a batch.
struct LayersView {
    MatrixView first;
    std::int64_t layer_stride;  // elements
};

struct TaskGramParams {
    float* out;  // layers x columns x columns, contiguous
    LayersView base;
    const LayersView* experts;
    const float* weights;  // layers x count, on the device, contiguous; a task of weight 0 is left out
    const float* means;    // layers x count x columns, contiguous, or null
    std::int64_t count;    // T
    std::int64_t layers;
    std::int64_t rows;
    std::int64_t columns;
};

void task_gram_cuda(const TaskGramParams& p, void* stream);

}  // namespace pymerge
