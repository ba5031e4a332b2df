#include "ops/task_sum.h"

#include <vector>

#include "common/parallel.h"
#include "common/task_delta.h"

namespace pymerge {
namespace {

constexpr std::int64_t chunk_elements = 16384;

// out += weight (expert - base - mean)
template <class A, class W, class E>
PM_TARGET_CLONES void add_row(A* __restrict out, const W* __restrict base, const E* __restrict expert,
                              const A* __restrict mean, A weight, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] += weight * ((load<A>(expert[i]) - load<A>(base[i])) - mean[i]);
}

template <class A>
void sum_all(const TaskSumParams& p, int threads) {
    const std::vector<A> zeros(p.means == nullptr ? static_cast<std::size_t>(p.columns) : 0, A{0});
    const std::int64_t rows_per_chunk =
        std::max<std::int64_t>(1, chunk_elements / std::max<std::int64_t>(1, p.columns));
    for_each_chunk(p.rows, rows_per_chunk, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            A* out = static_cast<A*>(p.out.data) + row * p.columns;
            std::fill_n(out, p.columns, A{0});
            for (std::int64_t t = 0; t < p.count; ++t) {
                const A* mean = p.means == nullptr ? zeros.data() : static_cast<const A*>(p.means) + t * p.columns;
                const A weight = static_cast<A>(p.weights[t]);
                with_row(p.base, row, 0, [&](auto* w) {
                    with_row(p.experts[t], row, 0, [&](auto* e) { add_row<A>(out, w, e, mean, weight, p.columns); });
                });
            }
        }
    });
}

}  // namespace

void task_sum_cpu(const TaskSumParams& p, int threads) {
    check_rows("base", p.base, p.rows, p.columns);
    for (std::int64_t t = 0; t < p.count; ++t) check_rows("expert", p.experts[t], p.rows, p.columns);
    PM_CHECK(p.out.dtype == DType::f32 || p.out.dtype == DType::f64,
             "task_sum: dtype code " << static_cast<int>(p.out.dtype) << "; sums are float32 or float64");
    if (p.out.dtype == DType::f64) {
        sum_all<double>(p, threads);
    } else {
        sum_all<float>(p, threads);
    }
}

}  // namespace pymerge
