// Steps of Arcee Fusion: divergences of rows, importances of elements, and what these select. Source: mergekit.
#pragma once

#include "common/task_tensors.h"

namespace pymerge {

// A base and one expert, seen as rows.
struct RowTensors {
    TaskTensors tensors;  // one expert
    std::int64_t rows;
    std::int64_t columns;
};

// sum p ln(p / q) of each row, p = softmax(W_1) + 1e-8, q that of W_0; 0 where rounding makes it negative.
void row_divergence_cpu(double* divergence, const RowTensors& p, int threads);
// |W_1 - W_0| times the row's divergence, float32 or (if a tensor is float64) float64.
void importance_cpu(const Output& out, const RowTensors& p, const double* divergence, int threads);
// W_1, but W_0 where the importance is less than `least`.
void arcee_fusion_cpu(const Output& out, const RowTensors& p, const double* divergence, double least, int threads);

}  // namespace pymerge
