// out = W_0 + sum_t w_gt (W_t - W_0), or sum_t w_gt W_t, with weights for each row or each column g.
#pragma once

#include "common/matrix_view.h"

namespace pymerge {

struct CombineVectorsParams {
    Output out;
    MatrixView base;           // data null: origin 0
    const MatrixView* inputs;  // count tensors of rows x columns elements, each seen as one row
    const double* weights;     // [count, columns] or [count, rows]
    bool by_columns;
    std::int64_t count;
    std::int64_t rows;
    std::int64_t columns;
};

// Accumulates in double if any tensor is float64, else in float.
void combine_vectors_cpu(const CombineVectorsParams& p, int threads);

}  // namespace pymerge
