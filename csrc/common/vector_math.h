// exp and log of doubles in straight lines, for loops that the compiler turns into vectors.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

// e^x for x of -708 to 0: 2^n e^r with |r| <= ln(2) / 2, the Taylor series for e^r.
static inline double exp_of(double x) {
    constexpr double shift = 0x1.8p52;  // adding it leaves the nearest integer in the lowest bits
    const double moved = x * 0x1.71547652b82fep0 + shift;
    const double n = moved - shift;
    const double r = (x - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;  // ln 2 in two parts
    double sum = 1.0 / 6227020800.0;
    sum = sum * r + 1.0 / 479001600.0;
    sum = sum * r + 1.0 / 39916800.0;
    sum = sum * r + 1.0 / 3628800.0;
    sum = sum * r + 1.0 / 362880.0;
    sum = sum * r + 1.0 / 40320.0;
    sum = sum * r + 1.0 / 5040.0;
    sum = sum * r + 1.0 / 720.0;
    sum = sum * r + 1.0 / 120.0;
    sum = sum * r + 1.0 / 24.0;
    sum = sum * r + 1.0 / 6.0;
    sum = sum * r + 0.5;
    sum = sum * r + 1.0;
    sum = sum * r + 1.0;
    return sum * bit_copy<double>((bit_copy<std::uint64_t>(moved) + 1023) << 52);
}

// ln y of a normal y > 0: k ln 2 + ln m with m of sqrt(1/2) to sqrt(2), and for ln m the
// series of atanh in s = (m - 1) / (m + 1). Near 1 as exact relative to the result. Coefficients: FreeBSD's e_log.c.
static inline double log_of(double y) {
    constexpr std::uint64_t root = 0x3fe6a09e667f3bcd, one = 0x3ff0000000000000;
    const std::uint64_t bits = bit_copy<std::uint64_t>(y) + (one - root);
    const double k = bit_copy<double>(0x4330000000000000u | (bits >> 52)) - (0x1p52 + 1023.0);
    const double f = bit_copy<double>((bits & 0xfffffffffffffu) + root) - 1.0;
    const double s = f / (2.0 + f), z = s * s, w = z * z;
    const double even = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01));
    const double odd =
        z * (6.666666666666735130e-01 +
             w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01)));
    const double half_square = 0.5 * f * f;
    const double rest = s * (half_square + even + odd) + k * 1.90821492927058770002e-10;
    return k * 6.93147180369123816490e-01 - ((half_square - rest) - f);
}

}  // namespace pymerge
