#include "common/task_delta.h"

#include "common/parallel.h"

namespace pymerge {
namespace {

template <class A, class W, class E>
PM_TARGET_CLONES void subtract_row(A* __restrict out, const W* __restrict base, const E* __restrict expert,
                                   std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = task_delta(load<A>(expert[i]), load<A>(base[i]));
}

template <class A, class E>
PM_TARGET_CLONES void load_row(A* __restrict out, const E* __restrict expert, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = load<A>(expert[i]);
}

template <class A>
void subtract(A* out, const MatrixView& base, const MatrixView& expert, std::int64_t row, std::int64_t column,
              std::int64_t n) {
    with_row(base, row, column,
             [&](auto* w) { with_row(expert, row, column, [&](auto* e) { subtract_row(out, w, e, n); }); });
}

template <class A>
void subtract_or_load(A* out, const MatrixView& base, const MatrixView& expert, std::int64_t begin, std::int64_t n) {
    if (base.data == nullptr) {
        with_row(expert, 0, begin, [&](const auto* from) { load_row(out, from, n); });
        return;
    }
    subtract(out, base, expert, 0, begin, n);
}

}  // namespace

void row_deltas(float* out, const MatrixView& base, const MatrixView& expert, std::int64_t row, std::int64_t column,
                std::int64_t n) {
    subtract(out, base, expert, row, column, n);
}

void task_deltas(float* out, const MatrixView& base, const MatrixView& expert, std::int64_t begin, std::int64_t n) {
    subtract_or_load(out, base, expert, begin, n);
}

void task_deltas(double* out, const MatrixView& base, const MatrixView& expert, std::int64_t begin, std::int64_t n) {
    subtract_or_load(out, base, expert, begin, n);
}

}  // namespace pymerge
