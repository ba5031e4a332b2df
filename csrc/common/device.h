// What the .cu files share: loads by dtype code, and the launch check.
#pragma once

#include <cuda_runtime.h>

#include "common/check.h"
#include "common/dtype.h"

namespace pymerge {

// The dtype is the same for all threads of a launch, so the switch does not diverge.
template <class A>
__device__ __forceinline__ A load_at(const void* data, DType dtype, std::int64_t index) {
    switch (dtype) {
        case DType::f16: return load<A>(static_cast<const Half*>(data)[index]);
        case DType::bf16: return load<A>(static_cast<const BFloat16*>(data)[index]);
        case DType::f64: return load<A>(static_cast<const double*>(data)[index]);
        default: return load<A>(static_cast<const float*>(data)[index]);
    }
}

template <class A>
__device__ __forceinline__ void store_at(void* data, DType dtype, std::int64_t index, A value) {
    switch (dtype) {
        case DType::f16: static_cast<Half*>(data)[index] = Round<Half>::from(value); break;
        case DType::bf16: static_cast<BFloat16*>(data)[index] = Round<BFloat16>::from(value); break;
        case DType::f64: static_cast<double*>(data)[index] = Round<double>::from(value); break;
        default: static_cast<float*>(data)[index] = Round<float>::from(value); break;
    }
}

}  // namespace pymerge
