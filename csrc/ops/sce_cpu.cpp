#include "ops/sce.h"

#include "common/task_block.h"

namespace pymerge {
namespace {

template <class A>
PM_TARGET_CLONES void add(A* __restrict total, const A* __restrict values, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) total[i] += values[i];
}

template <class A>
PM_TARGET_CLONES void divide(A* __restrict values, A divisor, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) values[i] /= divisor;
}

template <class A>
PM_TARGET_CLONES void add_square_from(A* __restrict total, const A* __restrict tau, const A* __restrict mean,
                                      std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) total[i] += (tau[i] - mean[i]) * (tau[i] - mean[i]);
}

template <class A>
PM_TARGET_CLONES double sum_of_squares(const A* __restrict tau, std::int64_t n) {
    constexpr std::int64_t lanes = 16;
    double sums[lanes] = {};
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (std::int64_t k = 0; k < lanes; ++k) {
            sums[k] += static_cast<double>(tau[i + k]) * static_cast<double>(tau[i + k]);
        }
    }
    for (; i < n; ++i) sums[i % lanes] += static_cast<double>(tau[i]) * static_cast<double>(tau[i]);
    for (std::int64_t k = 1; k < lanes; ++k) sums[0] += sums[k];
    return sums[0];
}

template <class A>
PM_TARGET_CLONES void add_kept(A* __restrict total, A* __restrict divisor, const A* __restrict tau,
                               const A* __restrict sum, A weight, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        const A above = tau[i] > A(0) ? A(1) : A(0), below = tau[i] < A(0) ? A(1) : A(0);
        const A kept = (sum[i] >= A(0) ? above : below) * weight;
        total[i] += tau[i] * kept;  // NaN stays, whatever its weight
        divisor[i] += kept;
    }
}

template <class A>
PM_TARGET_CLONES void add_quotient(A* __restrict origin, const A* __restrict total, const A* __restrict divisor,
                                   A least, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        const A limited = divisor[i] < least ? least : divisor[i];
        origin[i] += total[i] / (limited == A(0) ? A(1) : limited);
    }
}

}  // namespace

void sce_spread_cpu(const Output& out, const TaskTensors& p, int threads) {
    in_compute_type(p, [&](auto tag) {
        using A = typename decltype(tag)::type;
        for_each_task_block<A>(p, threads, [&](TaskBlock<A>& block, std::int64_t, std::int64_t at, std::int64_t n) {
            block.read_taus(at, n);
            A *mean = block.row(0), *total = static_cast<A*>(out.data) + at;
            std::fill_n(mean, n, A(0));
            std::fill_n(total, n, A(0));
            for (std::int64_t t = 0; t < p.count; ++t) add<A>(mean, block.tau(t), n);
            divide<A>(mean, static_cast<A>(p.count), n);
            for (std::int64_t t = 0; t < p.count; ++t) add_square_from<A>(total, block.tau(t), mean, n);
            divide<A>(total, static_cast<A>(p.count), n);
        });
    });
}

void sce_energies_cpu(double* energies, const TaskTensors& p, const std::uint8_t* selected, int threads) {
    std::vector<double> partial(static_cast<std::size_t>(chunk_count(p.numel, task_chunk) * p.count));
    in_compute_type(p, [&](auto tag) {
        using A = typename decltype(tag)::type;
        for_each_task_block<A>(
            p, threads, [&](TaskBlock<A>& block, std::int64_t chunk, std::int64_t at, std::int64_t n) {
                block.read_taus(at, n, selected);
                for (std::int64_t t = 0; t < p.count; ++t) {
                    partial[static_cast<std::size_t>(chunk * p.count + t)] += sum_of_squares<A>(block.tau(t), n);
                }
            });
    });
    std::fill_n(energies, p.count, 0.0);
    for (std::size_t i = 0; i < partial.size(); ++i) energies[i % static_cast<std::size_t>(p.count)] += partial[i];
}

void sce_cpu(const Output& out, const TaskTensors& p, const std::uint8_t* selected, const double* weights, double least,
             int threads) {
    in_compute_type(p, [&](auto tag) {
        using A = typename decltype(tag)::type;
        for_each_task_block<A>(p, threads, [&](TaskBlock<A>& block, std::int64_t, std::int64_t at, std::int64_t n) {
            block.read_taus(at, n, selected);
            A *sum = block.row(0), *total = block.row(1), *divisor = block.row(2);
            for (std::int64_t k = 0; k < 3; ++k) std::fill_n(block.row(k), n, A(0));
            for (std::int64_t t = 0; t < p.count; ++t) add<A>(sum, block.tau(t), n);
            for (std::int64_t t = 0; t < p.count; ++t) {
                add_kept<A>(total, divisor, block.tau(t), sum, static_cast<A>(weights[t]), n);
            }
            add_quotient<A>(block.origin(), total, divisor, static_cast<A>(least), n);
            block.write(out, block.origin(), at, n);
        });
    });
}

}  // namespace pymerge
