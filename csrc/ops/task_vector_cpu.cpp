#include "ops/task_vector.h"

#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"

namespace pymerge {
namespace {

constexpr std::int64_t chunk_elements = 16384;
constexpr std::int64_t tile = 128;  // columns of one statistics item: its four sums stay in the first-level cache

// Calls f(const T* at (row, column)) for the stored type; float64 has no business here.
template <class F>
void with_row(const MatrixView& m, std::int64_t row, std::int64_t column, F&& f) {
    const std::int64_t offset = row * m.row_stride + column;
    switch (m.dtype) {
        case DType::f16: return f(static_cast<const Half*>(m.data) + offset);
        case DType::bf16: return f(static_cast<const BFloat16*>(m.data) + offset);
        default: return f(static_cast<const float*>(m.data) + offset);
    }
}

void check_view(const char* label, const MatrixView& m, std::int64_t columns) {
    PM_CHECK(m.dtype != DType::f64, label << " is float64; these kernels compute in float32, use the reference");
    PM_CHECK(m.row_stride >= columns, label << " has row stride " << m.row_stride << " for " << columns << " columns");
}

void check_sizes(std::int64_t rows, std::int64_t columns) {
    PM_CHECK(rows >= 0 && columns >= 0, "task vector: " << rows << " x " << columns << " elements");
}

template <class W, class E>
PM_TARGET_CLONES void subtract_row(
    float* __restrict out, const W* __restrict base, const E* __restrict expert, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = task_delta(load<float>(expert[i]), load<float>(base[i]));
}

template <class W, class E>
PM_TARGET_CLONES void subtract_centred_row(
    float* __restrict out,
    const W* __restrict base,
    const E* __restrict expert,
    const float* __restrict mean,
    std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = task_delta(load<float>(expert[i]), load<float>(base[i])) - mean[i];
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

PM_TARGET_CLONES void add_row(ColumnSums& s, const float* __restrict tau, std::int64_t n) {
    for (std::int64_t j = 0; j < n; ++j) {
        const double value = tau[j];
        const double d = value - static_cast<double>(s.first[j]);
        s.sum[j] += value;
        s.squares[j] += value * value;
        s.shifted[j] += d;
        s.shifted_squares[j] += d * d;
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
    float tau[tile];
    for (std::int64_t row = 0; row < p.rows; ++row) {
        subtract(tau, p.base, p.experts[task], row, column, n);
        if (row == 0) std::copy_n(tau, n, sums.first);
        add_row(sums, tau, n);
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

void task_vector_cpu(const TaskVectorParams& p, int threads) {
    check_sizes(p.rows, p.columns);
    check_view("base", p.base, p.columns);
    check_view("expert", p.expert, p.columns);
    const std::int64_t rows_per_chunk = std::max<std::int64_t>(1, chunk_elements / std::max<std::int64_t>(1, p.columns));
    for_each_chunk(p.rows, rows_per_chunk, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            float* out = p.out + row * p.columns;
            if (p.mean == nullptr) {
                subtract(out, p.base, p.expert, row, 0, p.columns);
                continue;
            }
            with_row(p.base, row, 0, [&](auto* w) {
                with_row(p.expert, row, 0, [&](auto* e) { subtract_centred_row(out, w, e, p.mean, p.columns); });
            });
        }
    });
}

void task_stats_cpu(const TaskStatsParams& p, int threads) {
    check_sizes(p.rows, p.columns);
    check_view("base", p.base, p.columns);
    for (std::int64_t t = 0; t < p.count; ++t) check_view("expert", p.experts[t], p.columns);
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
