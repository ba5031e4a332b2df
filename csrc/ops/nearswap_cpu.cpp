#include "ops/nearswap.h"

#include "common/task_block.h"

namespace pymerge {
namespace {

template <class A>
PM_TARGET_CLONES void nearswap_block(A* __restrict near, const A* __restrict far, A t, A least, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) near[i] = nearswap_step<A>(near[i], far[i], t, least);
}

}  // namespace

void nearswap_cpu(const Output& out, const TaskTensors& p, double t, double least, int threads) {
    in_compute_type(p, [&](auto tag) {
        using A = typename decltype(tag)::type;
        for_each_task_block<A>(p, threads, [&](TaskBlock<A>& block, std::int64_t, std::int64_t at, std::int64_t n) {
            block.read(block.origin(), p.base, at, n);
            block.read(block.tau(0), p.experts[0], at, n);
            nearswap_block<A>(block.origin(), block.tau(0), static_cast<A>(t), static_cast<A>(least), n);
            block.write(out, block.origin(), at, n);
        });
    });
}

}  // namespace pymerge
