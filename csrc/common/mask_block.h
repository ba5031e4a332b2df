// What ops that make masks share: a block of flags with its L1 norms, and the sums of all blocks in a fixed order.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "common/avx512.h"
#include "common/bitmask.h"

namespace pymerge {

struct Norms {
    double before = 0.0;
    double after = 0.0;

    void operator+=(const Norms& other) {
        before += other.before;
        after += other.after;
    }
};

// Sums of |delta| and of |delta| where the flag is 1, in lanes that are the same for every instruction set.
struct NormLanes {
    static constexpr std::int64_t count = 16;
    double before[count];
    double after[count];
};

// Of n / 16 * 16 elements. As vectors of the compiler's: it makes slower ones of loops over the lanes.
PM_TARGET_CLONES static inline void fill_lanes_anywhere(NormLanes& lanes, const float* __restrict delta,
                                                        const std::uint32_t* __restrict flags, std::int64_t n) {
    using Floats = float __attribute__((vector_size(4 * NormLanes::count)));
    using Words = std::int32_t __attribute__((vector_size(4 * NormLanes::count)));
    using Doubles = double __attribute__((vector_size(8 * NormLanes::count)));
    Doubles before{}, after{};
    for (std::int64_t i = 0; i + NormLanes::count <= n; i += NormLanes::count) {
        Words value, flag;
        memcpy(&value, delta + i, sizeof(value));
        memcpy(&flag, flags + i, sizeof(flag));
        const Words size = value & 0x7fffffff;
        before += __builtin_convertvector(reinterpret_cast<Floats>(size), Doubles);
        after += __builtin_convertvector(reinterpret_cast<Floats>(size & -flag), Doubles);
    }
    memcpy(lanes.before, &before, sizeof(before));
    memcpy(lanes.after, &after, sizeof(after));
}

#if defined(PM_AVX512)

__attribute__((target("arch=x86-64-v4"))) static inline void fill_lanes_avx512(NormLanes& lanes,
                                                                               const float* __restrict delta,
                                                                               const std::uint32_t* __restrict flags,
                                                                               std::int64_t n) {
    __m512d before[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()}, after[2] = {before[0], before[0]};
    for (std::int64_t i = 0; i + 16 <= n; i += 16) {
        const __m512 size = _mm512_abs_ps(_mm512_loadu_ps(delta + i));
        const __m512i flag = _mm512_loadu_si512(flags + i);
        const __mmask16 kept = _mm512_test_epi32_mask(flag, flag);
        const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(size));
        const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(size, 1));
        before[0] = _mm512_add_pd(before[0], low);
        before[1] = _mm512_add_pd(before[1], high);
        after[0] = _mm512_mask_add_pd(after[0], static_cast<__mmask8>(kept), after[0], low);
        after[1] = _mm512_mask_add_pd(after[1], static_cast<__mmask8>(kept >> 8), after[1], high);
    }
    memcpy(lanes.before, before, sizeof(before));
    memcpy(lanes.after, after, sizeof(after));
}

#endif

inline void fill_lanes(NormLanes& lanes, const float* delta, const std::uint32_t* flags, std::int64_t n) {
#if defined(PM_AVX512)
    if (has_avx512()) return fill_lanes_avx512(lanes, delta, flags, n);
#endif
    fill_lanes_anywhere(lanes, delta, flags, n);
}

// float64 is rare, and goes the plain way.
inline void fill_lanes(NormLanes& lanes, const double* delta, const std::uint32_t* flags, std::int64_t n) {
    lanes = {};
    for (std::int64_t i = 0; i < n / NormLanes::count * NormLanes::count; ++i) {
        const double size = std::fabs(delta[i]);
        lanes.before[i % NormLanes::count] += size;
        lanes.after[i % NormLanes::count] += flags[i] != 0 ? size : 0.0;
    }
}

template <class A>
Norms block_norms(const A* delta, const std::uint32_t* flags, std::int64_t n) {
    NormLanes lanes;
    fill_lanes(lanes, delta, flags, n);
    for (std::int64_t i = n / NormLanes::count * NormLanes::count; i < n; ++i) {
        const double size = std::fabs(static_cast<double>(delta[i]));
        lanes.before[0] += size;
        lanes.after[0] += flags[i] != 0 ? size : 0.0;
    }
    Norms sum;
    for (std::int64_t lane = 0; lane < NormLanes::count; ++lane) sum += {lanes.before[lane], lanes.after[lane]};
    // What is left out counts as multiplied by 0, which of infinity is NaN.
    for (std::int64_t i = 0; i < n && !std::isfinite(sum.before); ++i) {
        if (flags[i] == 0 && !std::isfinite(delta[i])) sum.after = std::numeric_limits<double>::quiet_NaN();
    }
    return sum;
}

// Adds the norms of `items` consecutive parts of each task, in their order.
inline void sum_norms(const std::vector<Norms>& parts, std::int64_t count, std::int64_t items, double* before,
                      double* after) {
    for (std::int64_t t = 0; t < count; ++t) {
        Norms sum;
        for (std::int64_t item = 0; item < items; ++item) sum += parts[static_cast<std::size_t>(t * items + item)];
        before[t] = sum.before;
        after[t] = sum.after;
    }
}

}  // namespace pymerge
