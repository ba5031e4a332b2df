#include "ops/task_stats.h"

#include <vector>

#include "common/parallel.h"
#include "common/task_delta.h"

namespace pymerge {
namespace {

constexpr std::int64_t tile = 128;  // columns of one statistics item: its four sums stay in the first-level cache

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
            row_deltas(tau + i * tile, p.base, p.experts[task], row + i, column, n);
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

}  // namespace

void task_stats_cpu(const TaskStatsParams& p, int threads) {
    check_rows("base", p.base, p.rows, p.columns);
    PM_CHECK(p.base.dtype != DType::f64, "task_stats: the base is float64, its means are float32; use the reference");
    for (std::int64_t t = 0; t < p.count; ++t) {
        check_rows("expert", p.experts[t], p.rows, p.columns);
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
