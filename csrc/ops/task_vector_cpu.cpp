#include "ops/task_vector.h"

#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"

namespace pymerge {
namespace {

constexpr std::int64_t chunk_elements = 16384;
constexpr std::int64_t tile = 128;  // columns of one statistics item: its four sums stay in the first-level cache

// Calls f(const T* at (row, column)) for the stored type.
template <class F>
void with_row(const MatrixView& m, std::int64_t row, std::int64_t column, F&& f) {
    dispatch(m.dtype, [&](auto tag) {
        f(static_cast<const typename decltype(tag)::type*>(m.data) + m.row_stride * row + column);
    });
}

void check_view(const char* label, const MatrixView& m, std::int64_t columns) {
    PM_CHECK(m.row_stride >= columns, label << " has row stride " << m.row_stride << " for " << columns << " columns");
}

void check_sizes(std::int64_t rows, std::int64_t columns) {
    PM_CHECK(rows >= 0 && columns >= 0, "task vectors: " << rows << " x " << columns << " elements");
}

template <class W, class E>
PM_TARGET_CLONES void subtract_row(
    float* __restrict out, const W* __restrict base, const E* __restrict expert, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = task_delta(load<float>(expert[i]), load<float>(base[i]));
}

template <class E>
PM_TARGET_CLONES void load_row(float* __restrict out, const E* __restrict expert, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = load<float>(expert[i]);
}

// out += weight (expert - base - mean)
template <class A, class W, class E>
PM_TARGET_CLONES void add_row(A* __restrict out, const W* __restrict base, const E* __restrict expert,
                              const A* __restrict mean, A weight, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] += weight * ((load<A>(expert[i]) - load<A>(base[i])) - mean[i]);
}

// Per column: sums of tau, tau^2, d and d^2 with d = tau - (first row). The shift keeps the centred sum exact for
// constant columns and well conditioned for nearly constant ones.
struct ColumnSums {
    double sum[tile] = {};
    double squares[tile] = {};
    double shifted[tile] = {};
    double shifted_squares[tile] = {};
    float first[tile] = {};
};

constexpr std::int64_t rows_at_once = 4;  // sums are loaded and stored once for so many rows

template <std::int64_t Rows>
PM_TARGET_CLONES void add_to_sums(ColumnSums& s, const float* __restrict tau, std::int64_t n) {
    for (std::int64_t j = 0; j < n; ++j) {
        double sum = s.sum[j], squares = s.squares[j], shifted = s.shifted[j], shifted_squares = s.shifted_squares[j];
        for (std::int64_t row = 0; row < Rows; ++row) {
            const double value = tau[row * tile + j];
            const double d = value - static_cast<double>(s.first[j]);
            sum += value;
            squares += value * value;
            shifted += d;
            shifted_squares += d * d;
        }
        s.sum[j] = sum;
        s.squares[j] = squares;
        s.shifted[j] = shifted;
        s.shifted_squares[j] = shifted_squares;
    }
}

void subtract(float* out, const MatrixView& base, const MatrixView& expert, std::int64_t row, std::int64_t column,
              std::int64_t n) {
    with_row(base, row, column, [&](auto* w) {
        with_row(expert, row, column, [&](auto* e) { subtract_row(out, w, e, n); });
    });
}

struct TileTotals {
    double norm;
    double trace;
};

TileTotals tile_stats(const TaskStatsParams& p, std::int64_t task, std::int64_t column, std::int64_t n) {
    ColumnSums sums;
    float tau[rows_at_once * tile];
    for (std::int64_t row = 0; row < p.rows; row += rows_at_once) {
        const std::int64_t count = std::min(rows_at_once, p.rows - row);
        for (std::int64_t i = 0; i < count; ++i) {
            subtract(tau + i * tile, p.base, p.experts[task], row + i, column, n);
        }
        if (row == 0) std::copy_n(tau, n, sums.first);
        if (count == rows_at_once) {
            add_to_sums<rows_at_once>(sums, tau, n);
        } else {
            for (std::int64_t i = 0; i < count; ++i) add_to_sums<1>(sums, tau + i * tile, n);
        }
    }
    const double rows = static_cast<double>(p.rows);
    TileTotals totals{0.0, 0.0};
    for (std::int64_t j = 0; j < n; ++j) {
        const double centred = sums.shifted_squares[j] - sums.shifted[j] * sums.shifted[j] / rows;
        totals.norm += sums.squares[j];
        totals.trace += centred < 0.0 ? 0.0 : centred;  // rounding; NaN stays NaN
        p.means[task * p.columns + column + j] = static_cast<float>(sums.sum[j] / rows);
    }
    return totals;
}

template <class A>
void sum_all(const TaskSumParams& p, int threads) {
    const std::vector<A> zeros(p.means == nullptr ? static_cast<std::size_t>(p.columns) : 0, A{0});
    const std::int64_t rows_per_chunk = std::max<std::int64_t>(1, chunk_elements / std::max<std::int64_t>(1, p.columns));
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

void task_deltas(float* out, const MatrixView& base, const MatrixView& expert, std::int64_t begin, std::int64_t n) {
    if (base.data == nullptr) {
        with_row(expert, 0, begin, [&](const auto* from) { load_row(out, from, n); });
        return;
    }
    subtract(out, base, expert, 0, begin, n);
}

void task_sum_cpu(const TaskSumParams& p, int threads) {
    check_sizes(p.rows, p.columns);
    check_view("base", p.base, p.columns);
    for (std::int64_t t = 0; t < p.count; ++t) check_view("expert", p.experts[t], p.columns);
    PM_CHECK(p.out.dtype == DType::f32 || p.out.dtype == DType::f64,
             "task_sum: dtype code " << static_cast<int>(p.out.dtype) << "; sums are float32 or float64");
    if (p.out.dtype == DType::f64) {
        sum_all<double>(p, threads);
    } else {
        sum_all<float>(p, threads);
    }
}

void task_stats_cpu(const TaskStatsParams& p, int threads) {
    check_sizes(p.rows, p.columns);
    check_view("base", p.base, p.columns);
    PM_CHECK(p.base.dtype != DType::f64, "task_stats: the base is float64, its means are float32; use the reference");
    for (std::int64_t t = 0; t < p.count; ++t) {
        check_view("expert", p.experts[t], p.columns);
        PM_CHECK(p.experts[t].dtype != DType::f64, "task_stats: an expert is float64; use the reference");
    }
    std::fill_n(p.norms, p.count, 0.0);
    std::fill_n(p.traces, p.count, 0.0);
    if (p.rows == 0) {
        std::fill_n(p.means, p.count * p.columns, 0.0f);
        return;
    }
    const std::int64_t tiles = chunk_count(p.columns, tile);
    std::vector<TileTotals> totals(static_cast<std::size_t>(tiles * p.count));
    for_each_item(tiles * p.count, threads, [&](std::int64_t item) {
        const std::int64_t column = (item % tiles) * tile;
        totals[static_cast<std::size_t>(item)] =
            tile_stats(p, item / tiles, column, std::min(tile, p.columns - column));
    });
    for (std::int64_t item = 0; item < tiles * p.count; ++item) {
        p.norms[item / tiles] += totals[static_cast<std::size_t>(item)].norm;
        p.traces[item / tiles] += totals[static_cast<std::size_t>(item)].trace;
    }
}

}  // namespace pymerge
