// W_0 + s L R of some rows: low-rank adaptation applied. Source: LoRA, arXiv 2106.09685, section 4.1.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/matrix_view.h"

namespace pymerge {

// Columns of a panel, a multiple of every tile's width.
constexpr std::int64_t panel_columns = 32;

struct LowRankSumParams {
    Output out;         // rows x columns, contiguous
    MatrixView base;    // W_0, the same
    MatrixView left;    // rows x rank, float32 or float64, contiguous
    MatrixView panels;  // of left's dtype: rank x panel_columns, panel after panel, until all columns have their place
    double scale;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t rank;
};

// One term more of an element's product, which are added in their order: the same bits wherever the element stands.
template <class A>
PM_HOST_DEVICE A low_rank_step(A total, A left, A right) {
    return std::fma(left, right, total);
}

void low_rank_sum_cpu(const LowRankSumParams& p, int threads);

}  // namespace pymerge
