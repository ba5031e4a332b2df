// csrc/common/mma.h for the CPU: lanes of a warp exchange their registers, and copies arrive as late as they may.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "cuda_runtime.h"

namespace pymerge {

enum class Operand { tf32, bf16, f16 };

namespace emulation {

struct Registers {
    std::uint32_t a[4];
    std::uint32_t b[2];
};

// What the lanes of a warp hand each other. Two places take turns, so that one wait is enough for both uses.
inline Registers exchanged[32][2][32];
inline unsigned turns[1024];

template <Operand operand>
double product(std::uint32_t a, std::uint32_t b) {
    if constexpr (operand == Operand::tf32) {  // 13 bits are not read
        return double(bit_copy<float>(a & 0xffffe000u)) * double(bit_copy<float>(b & 0xffffe000u));
    } else {
        double sum = 0;
        for (int shift = 0; shift < 32; shift += 16) {
            const auto left = static_cast<std::uint16_t>(a >> shift), right = static_cast<std::uint16_t>(b >> shift);
            if constexpr (operand == Operand::bf16) {
                sum += double(to_float(BFloat16{left})) * double(to_float(BFloat16{right}));
            } else {
                sum += double(to_float(Half{left})) * double(to_float(Half{right}));
            }
        }
        return sum;
    }
}

inline float towards_zero(double value) {
    const float nearest = static_cast<float>(value);
    const bool beyond = std::isfinite(value) && std::abs(double(nearest)) > std::abs(value);
    return beyond ? std::nextafter(nearest, 0.0f) : nearest;
}

}  // namespace emulation

template <Operand operand>
void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    emulation::Registers* lanes = emulation::exchanged[warp][emulation::turns[threadIdx.x]++ % 2];
    std::memcpy(lanes[lane].a, a, sizeof a);
    std::memcpy(lanes[lane].b, b, sizeof b);
    ::emulation::wait_for_warp();
    for (unsigned e = 0; e < 4; ++e) {
        const unsigned row = lane / 4, column = 2 * (lane % 4) + e % 2, lower = e / 2;
        double sum = c[e];
        for (unsigned k = 0; k < 8; ++k) {
            const std::uint32_t left = lanes[4 * row + k % 4].a[2 * (k / 4) + lower];
            sum += emulation::product<operand>(left, lanes[4 * column + k % 4].b[k / 4]);
        }
        c[e] = emulation::towards_zero(sum);
    }
}

template <Operand operand>
std::uint32_t pack_halves(float first, float second) {
    if constexpr (operand == Operand::bf16) {
        return to_bfloat16(first).bits | std::uint32_t(to_bfloat16(second).bits) << 16;
    } else {
        return to_half(first).bits | std::uint32_t(to_half(second).bits) << 16;
    }
}

inline float half_value(std::uint16_t bits) { return to_float(Half{bits}); }

template <int bytes>
void copy_async(float* shared, const float* from, bool zeros) {
    if (reinterpret_cast<std::uintptr_t>(shared) % bytes != 0 || reinterpret_cast<std::uintptr_t>(from) % bytes != 0) {
        throw std::logic_error("an asynchronous copy that is not aligned");
    }
    ::emulation::current().copies.push_back([=] {
        if (zeros) {
            std::memset(shared, 0, bytes);
        } else {
            std::memcpy(shared, from, bytes);
        }
    });
}

inline void wait_for_copies() {
    for (const auto& copy : ::emulation::current().copies) copy();
    ::emulation::current().copies.clear();
}

}  // namespace pymerge
