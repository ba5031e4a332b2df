// The base and experts of an op that goes element by element.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/matrix_view.h"

namespace pymerge {

// W_0 and T experts, each seen as one row of `numel` elements.
struct TaskTensors {
    MatrixView base;
    const MatrixView* experts;
    std::int64_t count;
    std::int64_t numel;

    // Computes in double if any tensor is float64, else in float.
    bool in_double() const { return is_double(base) || std::any_of(experts, experts + count, is_double); }
};

}  // namespace pymerge
