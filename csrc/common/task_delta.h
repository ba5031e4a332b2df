// Elements of task vectors tau_t = W_t - W_0, straight from the stored types, and their magnitudes. Deltas are formed
// in float32, or in float64 where one of both is float64.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/matrix_view.h"

namespace pymerge {

template <class A>
PM_HOST_DEVICE A task_delta(A value, A base) {
    return value - base;
}

// Magnitudes are ordered as their bits are, NaN above infinity.
PM_HOST_DEVICE std::uint32_t magnitude_key(float delta) { return bit_copy<std::uint32_t>(delta) & 0x7fffffffu; }
PM_HOST_DEVICE std::uint64_t magnitude_key(double delta) {
    return bit_copy<std::uint64_t>(delta) & 0x7fffffffffffffffu;
}

template <class A>
using MagnitudeKey = decltype(magnitude_key(A{}));

template <class A>
constexpr int key_bits = 8 * sizeof(A) - 1;

inline bool is_double_delta(const MatrixView& base, const MatrixView& expert) {
    return is_double(base) || is_double(expert);
}

// Calls f with the Tag of the type that these deltas are formed in.
template <class F>
decltype(auto) in_delta_type(const MatrixView& base, const MatrixView& expert, F&& f) {
    return is_double_delta(base, expert) ? f(Tag<double>{}) : f(Tag<float>{});
}

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

// out = W_t - W_0 of `n` elements of a row, in float32.
void row_deltas(float* out, const MatrixView& base, const MatrixView& expert, std::int64_t row, std::int64_t column,
                std::int64_t n);
// The same of tensors that are seen as one row, from `begin` on; W_t where the base is null.
void task_deltas(float* out, const MatrixView& base, const MatrixView& expert, std::int64_t begin, std::int64_t n);
void task_deltas(double* out, const MatrixView& base, const MatrixView& expert, std::int64_t begin, std::int64_t n);

}  // namespace pymerge
