// Instructions of sm_80 and newer that C++ has no words for: tensor cores, asynchronous copies, packed rounding.
// tests/backends/emulation/common/mma.h has the same functions for a CPU.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

// What tensor cores take. A word of 32 bits holds one TF32 number, or two 16-bit ones that follow each other along k.
enum class Operand { tf32, bf16, f16 };

// c += a b of a warp: 16 x 8 results, 8 words deep. With g = lane / 4 and q = lane % 4, a lane holds
//   a: words q and q + 4 of rows g and g + 8, as (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4);
//   b: words q and q + 4 of column g;   c: (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
// Sums inside are float32 rounded towards zero: long sums belong outside.
template <Operand operand>
__device__ __forceinline__ void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    if constexpr (operand == Operand::tf32) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else if constexpr (operand == Operand::bf16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// Two numbers rounded to the nearest of a 16-bit type, ties to even; the first is the lower half of the word.
template <Operand operand>
__device__ __forceinline__ std::uint32_t pack_halves(float first, float second) {
    std::uint32_t word;
    if constexpr (operand == Operand::bf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    }
    return word;
}

// float16 to float32 in one instruction; the same value as to_float.
__device__ __forceinline__ float half_value(std::uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Starts a copy of 4 or 16 bytes to shared memory, or of as many zeros; `from` must be valid either way.
template <int bytes>
__device__ __forceinline__ void copy_async(float* shared, const float* from, bool zeros) {
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    const int taken = zeros ? 0 : bytes;
    if constexpr (bytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(taken) : "memory");
    } else {
        static_assert(bytes == 4);
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(taken) : "memory");
    }
}

// Waits for this thread's copies; a barrier makes those of others visible.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace pymerge
