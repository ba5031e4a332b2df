// NaN and infinity, found by their exponents.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

// Whether no element is NaN or infinite.
bool is_finite_cpu(const void* values, DType dtype, std::int64_t numel);

}  // namespace pymerge
