#include "ops/wudi_adam_step.h"

#include "common/check.h"
#include "common/parallel.h"

namespace pymerge {
namespace {

constexpr std::int64_t chunk_size = 16384;

template <class A>
PM_TARGET_CLONES void update_chunk(A* __restrict D, A* __restrict m, A* __restrict v, const A* __restrict product,
                                   const A* __restrict B, AdamFactors<A> factors, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) adam_update<A>(D[i], m[i], v[i], product[i], B[i], factors);
}

template <class A>
void update_all(const AdamParams& p, int threads) {
    const AdamFactors<A> factors(p);
    for_each_chunk(p.numel, chunk_size, threads, [&](std::int64_t begin, std::int64_t end) {
        update_chunk<A>(static_cast<A*>(p.D) + begin, static_cast<A*>(p.m) + begin, static_cast<A*>(p.v) + begin,
                        static_cast<const A*>(p.product) + begin, static_cast<const A*>(p.B) + begin, factors,
                        end - begin);
    });
}

}  // namespace

void wudi_adam_step_cpu(const AdamParams& p, int threads) {
    PM_CHECK(p.numel >= 0, "wudi_adam_step: " << p.numel << " elements");
    PM_CHECK(p.dtype == DType::f32 || p.dtype == DType::f64,
             "wudi_adam_step: dtype code " << static_cast<int>(p.dtype) << "; only float32 and float64 are solved in");
    if (p.dtype == DType::f64) {
        update_all<double>(p, threads);
    } else {
        update_all<float>(p, threads);
    }
}

}  // namespace pymerge
