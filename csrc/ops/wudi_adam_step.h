// One Adam step on the gradient 2 (D A - B), given the product D A. No weight decay, eps outside the root.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

struct AdamParams {
    void* D;  // updated, as are m and v
    void* m;
    void* v;
    const void* product;  // D A
    const void* B;
    DType dtype;  // float32 or float64, of all five
    std::int64_t numel;
    double beta1;
    double beta2;
    double correction1;  // 1 - beta1^k
    double correction2;  // sqrt(1 - beta2^k)
    double lr;
    double eps;
};

template <class A>
struct AdamFactors {
    A keep2, take1, take2, root, step, eps;

    explicit AdamFactors(const AdamParams& p)
        : keep2(static_cast<A>(p.beta2)),
          take1(static_cast<A>(1.0 - p.beta1)),
          take2(static_cast<A>(1.0 - p.beta2)),
          root(static_cast<A>(1.0 / p.correction2)),
          step(static_cast<A>(-p.lr / p.correction1)),
          eps(static_cast<A>(p.eps)) {}
};

template <class A>
PM_HOST_DEVICE void adam_update(A& D, A& m, A& v, A product, A target, const AdamFactors<A>& f) {
    const A gradient = A(2) * (product - target);
    m = m + f.take1 * (gradient - m);
    v = f.keep2 * v + f.take2 * gradient * gradient;
    D = D + f.step * m / (std::sqrt(v) * f.root + f.eps);
}

void wudi_adam_step_cpu(const AdamParams& p, int threads);

}  // namespace pymerge
