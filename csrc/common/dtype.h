// Element types and their conversions. Host and device run the same integer code, so results agree bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define PM_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define PM_HOST_DEVICE inline __attribute__((always_inline))
#else
#define PM_HOST_DEVICE inline
#endif

namespace pymerge {

// Codes that Python passes (pymerge/common/dtypes.py holds the same table).
enum class DType : std::int32_t { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };

struct Half {
    std::uint16_t bits;
};

struct BFloat16 {
    std::uint16_t bits;
};

template <class To, class From>
PM_HOST_DEVICE To bit_copy(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}

PM_HOST_DEVICE float to_float(BFloat16 value) { return bit_copy<float>(static_cast<std::uint32_t>(value.bits) << 16); }

// Branch-free selects, so that compilers vectorise the loops around it.
PM_HOST_DEVICE float to_float(Half value) {
    const std::uint32_t magnitude = value.bits & 0x7fffu;
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000u) << 16;
    const std::uint32_t normal = (magnitude << 13) + (112u << 23);  // exponent bias 15 -> 127
    const std::uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
    // A subnormal is a whole number of 2^-24.
    const float tiny = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 5.9604644775390625e-8f;
    std::uint32_t bits = magnitude >= 0x7c00u ? special : normal;
    bits = magnitude < 0x0400u ? bit_copy<std::uint32_t>(tiny) : bits;
    return bit_copy<float>(bits | sign);
}

// Round to nearest, ties to even.
PM_HOST_DEVICE BFloat16 to_bfloat16(float value) {
    const std::uint32_t bits = bit_copy<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<std::uint16_t>(is_nan ? 0x7fc0u : rounded)};
}

// Round to nearest, ties to even; overflow to infinity.
PM_HOST_DEVICE Half to_half(float value) {
    const std::uint32_t bits = bit_copy<std::uint32_t>(value);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    // Normal range: rebias the exponent (127 -> 15) and round the 13 dropped bits; a carry reaches the exponent.
    const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal range: adding 0.5 aligns the last place of the sum with 2^-24, and the adder does the rounding.
    const std::uint32_t tiny = bit_copy<std::uint32_t>(bit_copy<float>(magnitude) + 0.5f) - (126u << 23);
    std::uint32_t half = magnitude < (113u << 23) ? tiny : normal;
    half = magnitude >= (143u << 23) ? 0x7c00u : half;  // 2^16 and more
    half = magnitude > 0x7f800000u ? 0x7e00u : half;    // NaN
    return {static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000u))};
}

// Load<A>: an element as the accumulation type A (float or double).
template <class A, class T>
PM_HOST_DEVICE A load(T value) {
    return static_cast<A>(value);
}
template <class A>
PM_HOST_DEVICE A load(Half value) {
    return static_cast<A>(to_float(value));
}
template <class A>
PM_HOST_DEVICE A load(BFloat16 value) {
    return static_cast<A>(to_float(value));
}

// Round<T>: an accumulated value as an element. float64 reaches 16 bits by way of float32, as in PyTorch.
template <class T>
struct Round {
    template <class A>
    static PM_HOST_DEVICE T from(A value) {
        return static_cast<T>(value);
    }
};
template <>
struct Round<Half> {
    template <class A>
    static PM_HOST_DEVICE Half from(A value) {
        return to_half(static_cast<float>(value));
    }
};
template <>
struct Round<BFloat16> {
    template <class A>
    static PM_HOST_DEVICE BFloat16 from(A value) {
        return to_bfloat16(static_cast<float>(value));
    }
};

}  // namespace pymerge
