// What ops that make masks share: a block of flags with its L1 norms, and the sums of all blocks in a fixed order.
#pragma once

#include <cmath>
#include <vector>

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

// Sums of |delta| and of |delta| where the flag is 1. The lanes are the same for every instruction set. As vectors of
// the compiler's: it makes slower ones of loops over the lanes.
PM_TARGET_CLONES static inline Norms block_norms(
    const float* __restrict delta, const std::uint32_t* __restrict flags, std::int64_t n) {
    constexpr std::int64_t lanes = 16;
    using Floats = float __attribute__((vector_size(4 * lanes)));
    using Words = std::int32_t __attribute__((vector_size(4 * lanes)));
    using Doubles = double __attribute__((vector_size(8 * lanes)));
    Doubles before{}, after{};
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        Words value, flag;
        memcpy(&value, delta + i, sizeof(value));
        memcpy(&flag, flags + i, sizeof(flag));
        const auto size = reinterpret_cast<Floats>(value & 0x7fffffff);
        before += __builtin_convertvector(size, Doubles);
        after += __builtin_convertvector(size * __builtin_convertvector(flag, Floats), Doubles);
    }
    for (; i < n; ++i) {
        const double size = std::fabs(static_cast<double>(delta[i]));
        before[0] += size;
        after[0] += size * static_cast<std::int32_t>(flags[i]);
    }
    Norms sum;
    for (std::int64_t lane = 0; lane < lanes; ++lane) sum += {before[lane], after[lane]};
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
