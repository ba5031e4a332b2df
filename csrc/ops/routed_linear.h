// Products with weights that are mixed for each sample, and the gradient of the gates, without a mixed weight or a
// gradient of a weight in memory. Source: WEMoE, arXiv 2402.00433, equation 6.
#pragma once

#include <cstdint>
#include <vector>

#include "common/task_storage.h"

namespace pymerge {

struct RoutedProduct {
    float* y;        // tokens x outputs, contiguous
    const float* x;  // tokens x depth, contiguous
    // Tokens ends[s] to ends[s + 1] are those of sample s.
    const std::int64_t* ends;
    const float* gates;  // samples x T
    const float* bias;   // samples x outputs, or null
    std::int64_t samples;
    bool transposed;  // false: y_s = x_s W_s^T + bias_s; true: y_s = x_s W_s + bias_s
    RoutedWeight weight;
};

struct RoutedGates {
    double* out;      // samples x T: <dy_s^T x_s, tau_t>
    const float* dy;  // tokens x rows, contiguous
    const float* x;   // tokens x columns, contiguous
    const std::int64_t* ends;
    std::int64_t samples;
    RoutedWeight weight;
};

// Floats in a vector register of the instruction sets that the functions below have code for and this machine runs,
// the best first; results are the same bits.
std::vector<int> routed_lanes();

void routed_product_cpu(const RoutedProduct& p, int lanes, int threads);
void routed_gates_cpu(const RoutedGates& p, int lanes, int threads);

}  // namespace pymerge
