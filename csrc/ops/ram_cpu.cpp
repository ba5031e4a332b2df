#include "ops/ram.h"

#include "common/task_block.h"

namespace pymerge {
namespace {

template <class A>
PM_TARGET_CLONES void add_active(A* __restrict total, A* __restrict count, A* __restrict lone, const A* __restrict tau,
                                 A epsilon, A factor, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        const bool active = ram_active<A>(tau[i], epsilon);
        total[i] += active ? tau[i] : A(0);
        count[i] += active ? A(1) : A(0);
        lone[i] = active ? factor : lone[i];
    }
}

template <class A>
PM_TARGET_CLONES void add_mean(A* __restrict origin, const A* __restrict total, const A* __restrict count,
                               const A* __restrict lone, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        const A mean = total[i] / std::max(count[i], A(1));
        origin[i] += count[i] == A(1) ? mean * lone[i] : mean;
    }
}

// The same for a number of tasks that is known here, in one loop.
template <class A, int tasks>
PM_TARGET_CLONES void add_mean_of(A* __restrict origin, const A* __restrict taus, const A* __restrict factors,
                                  A epsilon, std::int64_t n) {
    A factor[tasks];
    for (int t = 0; t < tasks; ++t) factor[t] = factors[t];
    for (std::int64_t i = 0; i < n; ++i) {
        A total = 0, count = 0, lone = 0;
        for (int t = 0; t < tasks; ++t) {
            const A tau = taus[t * task_block + i];
            const bool active = ram_active<A>(tau, epsilon);
            total += active ? tau : A(0);
            count += active ? A(1) : A(0);
            lone += active ? factor[t] : A(0);  // where one is active, its own
        }
        const A mean = total / std::max(count, A(1)), scaled = mean * lone;
        origin[i] += count == A(1) ? scaled : mean;
    }
}

// Whether it was one of a few tasks, so that all is done.
template <class A, int tasks = 4>
bool add_mean_of_few(TaskBlock<A>& block, const TaskTensors& p, double epsilon, const double* factors, std::int64_t n) {
    if constexpr (tasks == 0) {
        return false;
    } else {
        if (p.count != tasks) return add_mean_of_few<A, tasks - 1>(block, p, epsilon, factors, n);
        A own[tasks];
        for (int t = 0; t < tasks; ++t) own[t] = factors == nullptr ? A(1) : static_cast<A>(factors[t]);
        add_mean_of<A, tasks>(block.origin(), block.tau(0), own, static_cast<A>(epsilon), n);
        return true;
    }
}

template <class A>
PM_TARGET_CLONES void count_active(std::int64_t* __restrict counts, const A* __restrict tau, const A* __restrict count,
                                   A epsilon, std::int64_t n) {
    std::int32_t lone = 0, shared = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const bool active = ram_active<A>(tau[i], epsilon);
        lone += active && count[i] == A(1) ? 1 : 0;
        shared += active && count[i] > A(1) ? 1 : 0;
    }
    counts[0] += lone;
    counts[1] += shared;
}

template <class A>
void sum_active(TaskBlock<A>& block, const TaskTensors& p, double epsilon, const double* factors, std::int64_t n) {
    for (std::int64_t k = 0; k < 3; ++k) std::fill_n(block.row(k), n, A(0));
    for (std::int64_t t = 0; t < p.count; ++t) {
        const A factor = factors == nullptr ? A(1) : static_cast<A>(factors[t]);
        add_active<A>(block.row(0), block.row(1), block.row(2), block.tau(t), static_cast<A>(epsilon), factor, n);
    }
}

}  // namespace

void ram_cpu(const Output& out, const TaskTensors& p, double epsilon, const double* factors, int threads) {
    in_compute_type(p, [&](auto tag) {
        using A = typename decltype(tag)::type;
        for_each_task_block<A>(p, threads, [&](TaskBlock<A>& block, std::int64_t, std::int64_t at, std::int64_t n) {
            block.read_taus(at, n);
            if (!add_mean_of_few<A>(block, p, epsilon, factors, n)) {
                sum_active<A>(block, p, epsilon, factors, n);
                add_mean<A>(block.origin(), block.row(0), block.row(1), block.row(2), n);
            }
            block.write(out, block.origin(), at, n);
        });
    });
}

void ram_counts_cpu(std::int64_t* counts, const TaskTensors& p, double epsilon, int threads) {
    std::vector<std::int64_t> partial(static_cast<std::size_t>(chunk_count(p.numel, task_chunk) * p.count * 2));
    in_compute_type(p, [&](auto tag) {
        using A = typename decltype(tag)::type;
        for_each_task_block<A>(p, threads,
                               [&](TaskBlock<A>& block, std::int64_t chunk, std::int64_t at, std::int64_t n) {
                                   block.read_taus(at, n);
                                   sum_active<A>(block, p, epsilon, nullptr, n);
                                   for (std::int64_t t = 0; t < p.count; ++t) {
                                       std::int64_t* here = partial.data() + (chunk * p.count + t) * 2;
                                       count_active<A>(here, block.tau(t), block.row(1), static_cast<A>(epsilon), n);
                                   }
                               });
    });
    std::fill_n(counts, p.count * 2, 0);
    for (std::size_t i = 0; i < partial.size(); ++i) counts[i % static_cast<std::size_t>(p.count * 2)] += partial[i];
}

}  // namespace pymerge
