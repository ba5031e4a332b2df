// The elements of a row in the order of their magnitude.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

#include "common/dtype.h"
#include "common/parallel.h"

namespace pymerge {

// Sorts a row by one pass into buckets of equal width, about one element each, and comparisons within a bucket.
class RowRanks {
public:
    explicit RowRanks(std::int64_t columns)
        : sorted_(static_cast<std::size_t>(columns)),
          buckets_(static_cast<std::size_t>(columns)),
          starts_(static_cast<std::size_t>(columns) * buckets_an_element + 1) {}

    // Indices 0 .. n - 1 by ascending |delta|, equal ones ascending themselves, in the low halves of the result.
    const std::uint64_t* ascending(const float* delta, std::int64_t n) {
        const std::uint32_t largest = largest_key(delta, n);
        const auto limit = static_cast<std::uint32_t>(n * buckets_an_element - 1);
        const float scale = static_cast<float>(limit) / bit_copy<float>(largest);
        // Zeros, subnormals, infinity or NaN: no such scale.
        if (!(scale > 0.0f && scale < 1e30f)) return by_comparison(delta, n);
        find_buckets(buckets_.data(), delta, scale, limit, n);
        std::fill(starts_.begin(), starts_.end(), 0u);
        for (std::int64_t i = 0; i < n; ++i) ++starts_[buckets_[i]];
        std::uint32_t sum = 0;
        for (std::uint32_t& start : starts_) {
            const std::uint32_t size = start;
            start = sum;
            sum += size;
        }
        for (std::int64_t i = 0; i < n; ++i) sorted_[starts_[buckets_[i]]++] = item(delta, i);
        settle(n);
        return sorted_.data();
    }

private:
    static constexpr std::int64_t buckets_an_element = 2;

    // Ordered by magnitude, then by index.
    static std::uint64_t item(const float* delta, std::int64_t i) {
        return (static_cast<std::uint64_t>(bit_copy<std::uint32_t>(delta[i]) & 0x7fffffffu) << 32) |
               static_cast<std::uint64_t>(i);
    }

    PM_TARGET_CLONES static std::uint32_t largest_key(const float* delta, std::int64_t n) {
        std::uint32_t largest = 0;
        for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, bit_copy<std::uint32_t>(delta[i]) & 0x7fffffffu);
        return largest;
    }

    // Rounding keeps the order: a larger magnitude is never in a lower bucket.
    PM_TARGET_CLONES static void find_buckets(std::uint32_t* __restrict buckets, const float* __restrict delta, float scale,
                                       std::uint32_t limit, std::int64_t n) {
        for (std::int64_t i = 0; i < n; ++i) {
            const float place = bit_copy<float>(bit_copy<std::uint32_t>(delta[i]) & 0x7fffffffu) * scale;
            buckets[i] = std::min(static_cast<std::uint32_t>(static_cast<std::int32_t>(place)), limit);
        }
    }

    const std::uint64_t* by_comparison(const float* delta, std::int64_t n) {
        for (std::int64_t i = 0; i < n; ++i) sorted_[i] = item(delta, i);
        std::sort(sorted_.begin(), sorted_.begin() + n);
        return sorted_.data();
    }

    // Sorts within the buckets, whose elements are in the order of their index; starts_ holds their ends by now.
    void settle(std::int64_t n) {
        std::uint64_t* a = sorted_.data();
        for (std::int64_t i = 1; i < n; ++i) {
            if (a[i - 1] <= a[i]) continue;
            const std::uint32_t bucket = buckets_[static_cast<std::uint32_t>(a[i])];
            const std::int64_t begin = bucket == 0 ? 0 : starts_[bucket - 1], end = starts_[bucket];
            std::sort(a + begin, a + end);
            i = end - 1;
        }
    }

    std::vector<std::uint64_t> sorted_;
    std::vector<std::uint32_t> buckets_;
    std::vector<std::uint32_t> starts_;
};

}  // namespace pymerge
