// Elements of tensors that a thread of a device loads four at a time: 16 bytes of float32, 8 of the 16-bit types.
#pragma once

#include <cuda_runtime.h>

#include "common/check.h"
#include "common/dtype.h"

namespace pymerge {

struct alignas(16) Quad {
    std::uint32_t words[4];
};

struct alignas(8) Duo {
    std::uint32_t words[2];
};

// 4 elements as they are in memory, the first `valid` of them from there and zeros else; 16-bit ones in two words. The
// dtype is the same for all threads of a launch, so that its branches do not diverge.
__device__ __forceinline__ Quad load_quad(const void* data, DType dtype, std::int64_t offset, int valid, bool vector) {
    Quad quad{};
    if (valid == 0) return quad;
    if (dtype == DType::f32) {
        const auto* from = static_cast<const std::uint32_t*>(data) + offset;
        if (vector) return *reinterpret_cast<const Quad*>(from);
#pragma unroll
        for (int e = 0; e < 4; ++e) quad.words[e] = e < valid ? from[e] : 0u;
        return quad;
    }
    const auto* from = static_cast<const std::uint16_t*>(data) + offset;
    if (vector) {
        const Duo two = *reinterpret_cast<const Duo*>(from);
        return {{two.words[0], two.words[1], 0u, 0u}};
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        quad.words[e / 2] |= (e < valid ? static_cast<std::uint32_t>(from[e]) : 0u) << (16 * (e % 2));
    }
    return quad;
}

// float16 to float32: on a device in one instruction.
__device__ __forceinline__ float half_value(std::uint16_t bits) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return to_float(Half{bits});
#endif
}

// Element e of a quad, as float32.
__device__ __forceinline__ float element(const Quad& quad, DType dtype, int e) {
    if (dtype == DType::f32) return bit_copy<float>(quad.words[e]);
    const auto bits = static_cast<std::uint16_t>(quad.words[e / 2] >> (16 * (e % 2)));
    return dtype == DType::bf16 ? to_float(BFloat16{bits}) : half_value(bits);
}

}  // namespace pymerge
