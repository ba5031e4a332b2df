// Element by element on models and task vectors tau_t = W_t - W_0: nearswap, ram, sce.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/matrix_view.h"

namespace pymerge {

// W_0 and T experts, each seen as one row of `numel` elements.
struct TaskTensors {
    MatrixView base;
    const MatrixView* experts;
    std::int64_t count;
    std::int64_t numel;

    // Computes in double if any tensor is float64, else in float.
    bool in_double() const { return is_double(base) || std::any_of(experts, experts + count, is_double); }
};

// q W_1 + (1 - q) W_0 with q = min(t / max(|W_1 - W_0|, least), 1), in the steps of the reference. NaN stays NaN.
template <class A>
PM_HOST_DEVICE A nearswap_step(A near, A far, A t, A least) {
    const A distance = std::abs(far - near);
    const A share = (A(1) / (distance < least ? least : distance)) * t;
    const A most = share > A(1) ? A(1) : share;
    return most * far + (A(1) - most) * near;
}

// NaN is active, so that it is in the result.
template <class A>
PM_HOST_DEVICE bool ram_active(A tau, A epsilon) {
    return !(std::abs(tau) <= epsilon);
}

void nearswap_cpu(const Output& out, const TaskTensors& p, double t, double least, int threads);

// W_0 + the mean of the active tau_t, times factors[t] where tau_t alone is active (null: 1).
void ram_cpu(const Output& out, const TaskTensors& p, double epsilon, const double* factors, int threads);
// counts [T x 2]: elements where tau_t alone is active, and where it and another are.
void ram_counts_cpu(std::int64_t* counts, const TaskTensors& p, double epsilon, int threads);

// Variance of the tau_t at each element, in `out` (float32 or float64, as computed).
void sce_spread_cpu(const Output& out, const TaskTensors& p, int threads);
// Sums of tau_t^2 over the selected elements (a bit each, as in common/bitmask.h; null: all), in an order that `numel`
// alone decides.
void sce_energies_cpu(double* energies, const TaskTensors& p, const std::uint8_t* selected, int threads);
// W_0 + sum_t w_t keep_t tau_t / max(sum_t w_t keep_t, least), W_0 where the divisor is 0.
void sce_cpu(const Output& out, const TaskTensors& p, const std::uint8_t* selected, const double* weights, double least,
             int threads);

}  // namespace pymerge
