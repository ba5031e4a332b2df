// Task vectors of weights that are mixed for each sample, dense or sparse.
#pragma once

#include <cstdint>

#include "common/matrix_view.h"

namespace pymerge {

// T dense task vectors of `numel` contiguous elements each, `stride` elements apart.
struct DenseTasks {
    const void* data;
    DType dtype;
    std::int64_t stride;
    std::int64_t count;  // T
};

// T sparse matrices, row by row: entries starts[t * start_stride + r] to starts[t * start_stride + r + 1] are those of
// row r. Columns are uint16 where `wide` is false, else int32.
struct SparseTasks {
    const void* values;
    DType dtype;
    const void* columns;
    bool wide;
    const std::int64_t* starts;
    std::int64_t start_stride;
    std::int64_t count;  // T
};

// W_0 (rows x columns, contiguous) and its task vectors.
struct RoutedWeight {
    MatrixView base;
    std::int64_t rows;
    std::int64_t columns;
    const DenseTasks* dense;    // one of the two
    const SparseTasks* sparse;  // columns ascend in each row
    std::int64_t count;         // T
};

}  // namespace pymerge
