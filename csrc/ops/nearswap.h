// The other model's weights where they are near the base's, a mean of both elsewhere. Source: the model card of
// QuartetAnemoi-70B-t0.0001; mergekit.
#pragma once

#include <cmath>

#include "common/task_tensors.h"

namespace pymerge {

// q W_1 + (1 - q) W_0 with q = min(t / max(|W_1 - W_0|, least), 1), in the steps of the reference. NaN stays NaN.
template <class A>
PM_HOST_DEVICE A nearswap_step(A near, A far, A t, A least) {
    const A distance = std::abs(far - near);
    const A share = (A(1) / (distance < least ? least : distance)) * t;
    const A most = share > A(1) ? A(1) : share;
    return most * far + (A(1) - most) * near;
}

void nearswap_cpu(const Output& out, const TaskTensors& p, double t, double least, int threads);

}  // namespace pymerge
