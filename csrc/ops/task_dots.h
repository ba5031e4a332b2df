// Inner products <v_s, v_t> of models, v_t = W_t, or of task vectors, v_t = W_t - W_0.
#pragma once

#include <cstdint>

#include "common/matrix_view.h"

namespace pymerge {

struct TaskDotsParams {
    double* out;               // vectors x count x count
    MatrixView base;           // data null: v_t = W_t
    const MatrixView* inputs;  // count tensors of vectors x length elements, each seen as one row
    std::int64_t count;
    std::int64_t vectors;
    std::int64_t length;
};

// Sums run in double, in an order that `length` alone decides.
void task_dots_cpu(const TaskDotsParams& p, int threads);

}  // namespace pymerge
