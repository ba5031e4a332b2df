// SCE on task vectors tau_t = W_t - W_0: their spread, their energies, and means of the majority's sign.
// Source: FuseChat-3.0, arXiv 2408.07990; mergekit.
#pragma once

#include "common/task_tensors.h"

namespace pymerge {

// Variance of the tau_t at each element, in `out` (float32 or float64, as computed).
void sce_spread_cpu(const Output& out, const TaskTensors& p, int threads);
// Sums of tau_t^2 over the selected elements (a bit each, as in common/bitmask.h; null: all), in an order that `numel`
// alone decides.
void sce_energies_cpu(double* energies, const TaskTensors& p, const std::uint8_t* selected, int threads);
// W_0 + sum_t w_t keep_t tau_t / max(sum_t w_t keep_t, least), W_0 where the divisor is 0.
void sce_cpu(const Output& out, const TaskTensors& p, const std::uint8_t* selected, const double* weights, double least,
             int threads);

}  // namespace pymerge
