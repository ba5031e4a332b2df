// N Adam steps on the gradient 2 (D A - B), from D = 0, of a batch of layers. WUDI-Merging (arXiv 2503.08099).
#pragma once

#include <cstdint>

namespace pymerge {

struct WudiAdamParams {
    float* D;      // layers x rows x columns, as other, m, v and B; 0 at first, as m and v
    float* other;  // steps write D and other in turn: the result is in D after an even number of them
    float* m;
    float* v;
    const float* A;  // layers x columns x columns
    const float* B;
    const double* lr;  // layers, on the device
    std::int64_t layers;
    std::int64_t rows;
    std::int64_t columns;
    std::int64_t iterations;
    double beta1;
    double beta2;
    double eps;
};

// Launches all steps, and waits for none: a stream that is being captured records them.
void wudi_adam_cuda(const WudiAdamParams& p, void* stream);

}  // namespace pymerge
