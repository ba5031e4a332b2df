// Elements of matrices on their way to tensor cores: loaded four at a time, and split into what those take, hi + lo.
#pragma once

#include <cmath>

#include "common/device.h"
#include "common/mma.h"
#include "common/tiles.h"

namespace pymerge {

constexpr int strip_words = 8;  // along k: what one mma takes

// Rows that a word holds: one TF32 number, or two of 16 bits.
template <Operand operand>
constexpr int rows_per_word = operand == Operand::tf32 ? 1 : 2;

struct alignas(16) Quad {
    std::uint32_t words[4];
};

struct alignas(8) Duo {
    std::uint32_t words[2];
};

template <Operand operand>
PM_HOST_DEVICE bool is_wide(DType dtype) {
    return operand == Operand::tf32 && dtype == DType::f32;
}

// 4 elements as they are in memory, the first `valid` of them from there and zeros else; 16-bit ones in two words.
template <Operand operand>
__device__ __forceinline__ Quad load_quad(const void* data, DType dtype, std::int64_t offset, int valid, bool vector) {
    Quad quad{};
    if (valid == 0) return quad;
    if (is_wide<operand>(dtype)) {
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

// Element e of a quad, as float32.
template <Operand operand>
__device__ __forceinline__ float element(const Quad& quad, DType dtype, int e) {
    if (is_wide<operand>(dtype)) return bit_copy<float>(quad.words[e]);
    const auto bits = static_cast<std::uint16_t>(quad.words[e / 2] >> (16 * (e % 2)));
    const bool brain = operand == Operand::tf32 ? dtype == DType::bf16 : operand == Operand::bf16;
    return brain ? to_float(BFloat16{bits}) : half_value(bits);
}

// The largest finite number that is one operand.
template <Operand operand>
constexpr float largest_operand = operand == Operand::f16    ? 65504.0f
                                  : operand == Operand::bf16 ? 0x1.fep127f
                                                             : 0x1.ffcp127f;

template <Operand operand>
__device__ __forceinline__ std::uint32_t to_word(const float (&x)[rows_per_word<operand>]) {
    if constexpr (operand == Operand::tf32) {
        return round_tf32(x[0]);
    } else {
        return pack_halves<operand>(x[0], x[1]);
    }
}

// As to_word, of what is left over: of a lo that is not TF32, tensor cores leave out the last bit, one of x's 24.
template <Operand operand>
__device__ __forceinline__ std::uint32_t lo_word(const float (&x)[rows_per_word<operand>]) {
    if constexpr (operand == Operand::tf32) {
        return bit_copy<std::uint32_t>(x[0]);
    } else {
        return pack_halves<operand>(x[0], x[1]);
    }
}

template <Operand operand>
__device__ __forceinline__ void from_word(std::uint32_t word, float (&x)[rows_per_word<operand>]) {
    if constexpr (operand == Operand::tf32) {
        x[0] = bit_copy<float>(word);
    } else if constexpr (operand == Operand::bf16) {
        x[0] = bit_copy<float>(word << 16);
        x[1] = bit_copy<float>(word & 0xffff0000u);
    } else {
        x[0] = half_value(static_cast<std::uint16_t>(word));
        x[1] = half_value(static_cast<std::uint16_t>(word >> 16));
    }
}

PM_HOST_DEVICE bool is_finite(float x) { return (bit_copy<std::uint32_t>(x) & 0x7f800000u) != 0x7f800000u; }

// 0 in place of infinity and NaN: infinity times a lo of 0 would be NaN.
template <Operand operand>
PM_HOST_DEVICE std::uint32_t finite_word(std::uint32_t word) {
    if constexpr (operand == Operand::tf32) {
        return is_finite(bit_copy<float>(word)) ? word : 0u;
    } else {
        constexpr std::uint32_t exponent = operand == Operand::bf16 ? 0x7f80u : 0x7c00u;
        if ((word & exponent) == exponent) word &= 0xffff0000u;
        if ((word >> 16 & exponent) == exponent) word &= 0x0000ffffu;
        return word;
    }
}

struct SplitQuad {
    Quad hi, lo;
    bool with_lo;       // some lo is not 0
    bool with_special;  // something is infinite or NaN; its lo is 0
};

// Four words of rows of tau as hi + lo.
template <Operand operand>
__device__ __forceinline__ SplitQuad split_quad(const float (&tau)[4][rows_per_word<operand>]) {
    SplitQuad parts{};
    bool ordinary = true;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        float rest[rows_per_word<operand>];
        parts.hi.words[e] = to_word<operand>(tau[e]);
        from_word<operand>(parts.hi.words[e], rest);
#pragma unroll
        for (int h = 0; h < rows_per_word<operand>; ++h) {
            rest[h] = tau[e][h] - rest[h];
            parts.with_lo |= rest[h] != 0.0f;
            ordinary &= is_finite(rest[h]);
        }
        parts.lo.words[e] = lo_word<operand>(rest);
    }
    if (ordinary) return parts;

    // Something is infinite or NaN, or beyond the operands' range: there, hi is their largest and lo takes the rest.
    parts.with_lo = false;
    constexpr float most = largest_operand<operand>;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        float top[rows_per_word<operand>], rest[rows_per_word<operand>];
#pragma unroll
        for (int h = 0; h < rows_per_word<operand>; ++h) {
            const float x = tau[e][h];
            top[h] = is_finite(x) && std::fabs(x) > most ? std::copysign(most, x) : x;
            // Rounding would carry a NaN of all ones into its sign.
            if (x != x) top[h] = bit_copy<float>(0x7fc00000u);
        }
        parts.hi.words[e] = to_word<operand>(top);
        from_word<operand>(parts.hi.words[e], rest);
#pragma unroll
        for (int h = 0; h < rows_per_word<operand>; ++h) {
            rest[h] = is_finite(tau[e][h]) ? tau[e][h] - rest[h] : 0.0f;
            parts.with_lo |= rest[h] != 0.0f;
            parts.with_special |= !is_finite(tau[e][h]);
        }
        parts.lo.words[e] = lo_word<operand>(rest);
    }
    return parts;
}

}  // namespace pymerge
