// Elements of task vectors tau_t = W_t - W_0 in float32, straight from the stored types, and their magnitudes.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/matrix_view.h"

namespace pymerge {

PM_HOST_DEVICE float task_delta(float value, float base) { return value - base; }

// Magnitudes are ordered as their bits are, NaN above infinity.
PM_HOST_DEVICE std::uint32_t magnitude_key(float delta) { return bit_copy<std::uint32_t>(delta) & 0x7fffffffu; }

// Calls f(const T* at (row, column)) for the stored type.
template <class F>
void with_row(const MatrixView& m, std::int64_t row, std::int64_t column, F&& f) {
    dispatch(m.dtype, [&](auto tag) {
        f(static_cast<const typename decltype(tag)::type*>(m.data) + m.row_stride * row + column);
    });
}

inline void check_rows(const char* label, const MatrixView& m, std::int64_t rows, std::int64_t columns) {
    PM_CHECK(rows >= 0 && columns >= 0, "task vectors: " << rows << " x " << columns << " elements");
    PM_CHECK(m.row_stride >= columns, label << " has row stride " << m.row_stride << " for " << columns << " columns");
}

// out = W_t - W_0 of `n` elements of a row.
void row_deltas(float* out, const MatrixView& base, const MatrixView& expert, std::int64_t row, std::int64_t column,
                std::int64_t n);
// The same of tensors that are seen as one row, from `begin` on; W_t where the base is null.
void task_deltas(float* out, const MatrixView& base, const MatrixView& expert, std::int64_t begin, std::int64_t n);

}  // namespace pymerge
