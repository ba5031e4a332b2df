#include "ops/arcee_fusion.h"

#include <cmath>
#include <limits>

#include "common/task_block.h"
#include "common/vector_math.h"

namespace pymerge {
namespace {

constexpr std::int64_t lanes = 16;
constexpr double small = 1e-8;     // added to probabilities
constexpr double lowest = -708.0;  // e^x is the least normal number there

double sum_of_lanes(const double* sums) {
    double total = sums[0];
    for (std::int64_t k = 1; k < lanes; ++k) total += sums[k];
    return total;
}

// The largest; NaN if there is NaN or infinity, or nothing but -infinity.
PM_TARGET_CLONES double largest(const double* __restrict values, std::int64_t n) {
    constexpr double infinity = std::numeric_limits<double>::infinity();
    double most[lanes], wrong[lanes] = {};
    for (std::int64_t k = 0; k < lanes; ++k) most[k] = -infinity;
    for (std::int64_t i = 0; i < n; i += lanes) {
        for (std::int64_t k = 0; k < lanes; ++k) {
            most[k] = values[i + k] > most[k] ? values[i + k] : most[k];
            wrong[k] += values[i + k] < infinity ? 0.0 : 1.0;
        }
    }
    double found = -infinity, count = 0.0;
    for (std::int64_t k = 0; k < lanes; ++k) {
        found = std::max(found, most[k]);
        count += wrong[k];
    }
    return count > 0.0 || found == -infinity ? std::numeric_limits<double>::quiet_NaN() : found;
}

// values = e^(values - most); returns their sum.
PM_TARGET_CLONES double exponentials(double* __restrict values, double most, std::int64_t n) {
    double sums[lanes] = {};
    for (std::int64_t i = 0; i < n; i += lanes) {
        for (std::int64_t k = 0; k < lanes; ++k) {
            const double x = values[i + k] - most;
            values[i + k] = exp_of(x < lowest ? lowest : x);
            sums[k] += values[i + k];
        }
    }
    return sum_of_lanes(sums);
}

PM_TARGET_CLONES double divergence_of(const double* __restrict far, const double* __restrict near, double far_sum,
                                      double near_sum, std::int64_t n) {
    double sums[lanes] = {};
    for (std::int64_t i = 0; i < n; i += lanes) {
        for (std::int64_t k = 0; k < lanes; ++k) {
            const double p = far[i + k] / far_sum + small, q = near[i + k] / near_sum + small;
            sums[k] -= log_of(q / p) * p;
        }
    }
    return sum_of_lanes(sums);
}

// Values of a row, and -infinity behind them up to a multiple of `lanes`: they add small ln(small / small) = 0.
class Row {
  public:
    explicit Row(std::int64_t columns)
        : values_(static_cast<std::size_t>((columns + lanes - 1) / lanes * lanes)), columns_(columns) {}

    void read(const MatrixView& from, std::int64_t row) {
        dispatch(from.dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            read_values<double, T>(data(), static_cast<const T*>(from.data) + row * columns_, columns_);
        });
        std::fill(data() + columns_, data() + size(), -std::numeric_limits<double>::infinity());
        most_ = largest(data(), size());
        // The padding's exponentials are that of `lowest`, so small beside the others that no sum changes.
        sum_ = exponentials(data(), most_, size());
    }

    double* data() { return values_.data(); }
    std::int64_t size() const { return static_cast<std::int64_t>(values_.size()); }
    double sum() const { return sum_; }

  private:
    std::vector<double> values_;
    std::int64_t columns_;
    double most_ = 0.0, sum_ = 0.0;
};

template <class A>
PM_TARGET_CLONES void scores_of(A* __restrict scores, const A* __restrict far, const A* __restrict near,
                                double divergence, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        scores[i] = static_cast<A>(std::abs(static_cast<double>(far[i] - near[i]) * divergence));
    }
}

template <class A>
PM_TARGET_CLONES void choose(A* __restrict near, const A* __restrict far, const A* __restrict scores, A least,
                             std::int64_t n) {
    // Not less rather than at least: NaN takes over, and is in the result.
    for (std::int64_t i = 0; i < n; ++i) near[i] = scores[i] < least ? near[i] : far[i];
}

void check(const RowTensors& p) {
    PM_CHECK(p.rows >= 0 && p.columns >= 0 && p.rows * p.columns == p.tensors.numel,
             "rows: " << p.rows << " of " << p.columns << " columns, " << p.tensors.numel << " elements");
}

// Calls f(block, at, n) with W_0, W_1 and scores in a block, for each part of each row.
template <class A, class F>
void for_each_part(const RowTensors& p, const double* divergence, int threads, F&& f) {
    for_each_item(p.rows, threads, [&](std::int64_t row) {
        TaskBlock<A> block(p.tensors);
        for (std::int64_t begin = 0; begin < p.columns; begin += task_block) {
            const std::int64_t at = row * p.columns + begin, n = std::min(task_block, p.columns - begin);
            block.read(block.origin(), p.tensors.base, at, n);
            block.read(block.tau(0), p.tensors.experts[0], at, n);
            scores_of<A>(block.row(0), block.tau(0), block.origin(), divergence[row], n);
            f(block, at, n);
        }
    });
}

}  // namespace

void row_divergence_cpu(double* divergence, const RowTensors& p, int threads) {
    check(p);
    for_each_item(p.rows, threads, [&](std::int64_t row) {
        Row far(p.columns), near(p.columns);
        far.read(p.tensors.experts[0], row);
        near.read(p.tensors.base, row);
        if (!std::isfinite(far.sum()) || !std::isfinite(near.sum())) {  // the logarithm of NaN would not be NaN
            divergence[row] = std::numeric_limits<double>::quiet_NaN();
            return;
        }
        divergence[row] = std::max(0.0, divergence_of(far.data(), near.data(), far.sum(), near.sum(), far.size()));
    });
}

void importance_cpu(const Output& out, const RowTensors& p, const double* divergence, int threads) {
    check(p);
    in_compute_type(p.tensors, [&](auto tag) {
        using A = typename decltype(tag)::type;
        for_each_part<A>(p, divergence, threads, [&](TaskBlock<A>& block, std::int64_t at, std::int64_t n) {
            std::copy_n(block.row(0), n, static_cast<A*>(out.data) + at);
        });
    });
}

void arcee_fusion_cpu(const Output& out, const RowTensors& p, const double* divergence, double least, int threads) {
    check(p);
    in_compute_type(p.tensors, [&](auto tag) {
        using A = typename decltype(tag)::type;
        for_each_part<A>(p, divergence, threads, [&](TaskBlock<A>& block, std::int64_t at, std::int64_t n) {
            choose<A>(block.origin(), block.tau(0), block.row(0), static_cast<A>(least), n);
            block.write(out, block.origin(), at, n);
        });
    });
}

}  // namespace pymerge
