// W = W_0 + sum_t g_t tau_t, and the products <D, tau_t> of its gradient. Source: WEMoE, arXiv 2402.00433, equation 6.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/matrix_view.h"
#include "common/task_storage.h"

namespace pymerge {

struct MixParams {
    Output out;          // float32, float16 or bfloat16, contiguous: samples x rows x columns
    MatrixView base;     // W_0, contiguous
    const float* gates;  // samples x T
    std::int64_t samples;
    std::int64_t rows;
    std::int64_t columns;
};

// One task's share of one element; one rounding, the same on every instruction set.
PM_HOST_DEVICE float mix_step(float total, float gate, float tau) { return std::fma(gate, tau, total); }

void mix_dense_cpu(const MixParams& p, const DenseTasks& tasks, int threads);
void mix_sparse_cpu(const MixParams& p, const SparseTasks& tasks, int threads);

// out[t] = <delta, tau_t>, float64; delta is float32, contiguous.
void dots_dense_cpu(double* out, const float* delta, std::int64_t numel, const DenseTasks& tasks, int threads);
void dots_sparse_cpu(double* out, const float* delta, std::int64_t rows, std::int64_t columns, const SparseTasks& tasks,
                     int threads);

// y[n][o] += sum_t gates[n][t] sum_i tau_t[o][i] x[n][i]; all float32, x and gates contiguous, y with a row stride.
void add_sparse_products_cpu(float* y, std::int64_t y_stride, const float* x, const float* gates, std::int64_t tokens,
                             std::int64_t rows, std::int64_t columns, const SparseTasks& tasks, int threads);

}  // namespace pymerge
