// Tensors as the ops take them: memory of the caller's, and what is in it.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

// A matrix whose rows are contiguous, or a contiguous tensor that is seen as one row.
struct MatrixView {
    const void* data;  // null where an op takes no base
    DType dtype;
    std::int64_t row_stride;  // elements; of one row: all there are
};

// Where results go; the same.
struct Output {
    void* data;
    DType dtype;
    std::int64_t row_stride;
};

// False of no base: the first dtype is float32.
inline bool is_double(const MatrixView& view) { return view.dtype == DType::f64; }

}  // namespace pymerge
