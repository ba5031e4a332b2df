// Means of the task vectors that are active at an element, and counts of those.
// Source: RAM, arXiv 2601.13572.
#pragma once

#include <cmath>

#include "common/task_tensors.h"

namespace pymerge {

// NaN is active, so that it is in the result.
template <class A>
PM_HOST_DEVICE bool ram_active(A tau, A epsilon) {
    return !(std::abs(tau) <= epsilon);
}

// W_0 + the mean of the active tau_t, times factors[t] where tau_t alone is active (null: 1).
void ram_cpu(const Output& out, const TaskTensors& p, double epsilon, const double* factors, int threads);
// counts [T x 2]: elements where tau_t alone is active, and where it and another are.
void ram_counts_cpu(std::int64_t* counts, const TaskTensors& p, double epsilon, int threads);

}  // namespace pymerge
