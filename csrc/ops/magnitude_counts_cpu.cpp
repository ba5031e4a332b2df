#include "ops/magnitude_counts.h"

#include <vector>

#include "common/check.h"
#include "common/magnitude_blocks.h"

namespace pymerge {
namespace {

constexpr int key_bits = 31;
constexpr std::int64_t least = 16 * magnitude_block;  // elements that are worth a table of their own

void count_all(const MagnitudeCountsParams& p, std::int64_t task, std::int64_t begin, std::int64_t end,
               std::int64_t* table) {
    for_each_key_block(p.base, p.experts[task], begin, end,
                       [&](const std::uint32_t* keys, std::int64_t n, std::int64_t) {
                           for (std::int64_t i = 0; i < n; ++i) ++table[keys[i] >> p.shift];
                       });
}

void count_matching(const MagnitudeCountsParams& p, std::int64_t task, std::int64_t begin, std::int64_t end,
                    std::int64_t* table) {
    const std::uint32_t mask = (1u << p.bits) - 1;
    for_each_key_block(p.base, p.experts[task], begin, end,
                       [&](const std::uint32_t* keys, std::int64_t n, std::int64_t) {
                           for_each_matching(keys, n, p.prefixes[task], p.shift + p.bits,
                                             [&](std::uint32_t key) { ++table[(key >> p.shift) & mask]; });
                       });
}

}  // namespace

void magnitude_counts_cpu(const MagnitudeCountsParams& p, int threads) {
    PM_CHECK(p.bits >= 0 && p.bits <= 16 && p.shift >= 0 && p.shift + p.bits <= key_bits,
             "magnitude_counts: " << p.bits << " bits from bit " << p.shift << " on, of " << key_bits);
    for (std::int64_t t = 0; t < p.count; ++t) {
        PM_CHECK(p.base.dtype != DType::f64 && p.experts[t].dtype != DType::f64,
                 "magnitude_counts: an input is float64; use the reference");
    }
    // A table for each thread, the first one the result: whole numbers add up to the same in any order.
    const std::int64_t parts = std::clamp<std::int64_t>(p.numel / least, 1, std::max(threads, 1));
    const std::int64_t part = (p.numel + parts - 1) / parts, bins = std::int64_t{1} << p.bits;
    std::vector<std::int64_t> tables(static_cast<std::size_t>((parts - 1) * p.count * bins));
    for_each_item(parts, threads, [&](std::int64_t item) {
        std::int64_t* table = item == 0 ? p.counts : tables.data() + (item - 1) * p.count * bins;
        const std::int64_t stop = std::min(p.numel, (item + 1) * part);
        // Tasks take turns, so that the base's elements are still in the cache.
        for (std::int64_t begin = item * part; begin < stop; begin += least) {
            const std::int64_t end = std::min(stop, begin + least);
            for (std::int64_t task = 0; task < p.count; ++task) {
                if (p.shift + p.bits == key_bits && p.prefixes[task] == 0) {
                    count_all(p, task, begin, end, table + task * bins);
                } else {
                    count_matching(p, task, begin, end, table + task * bins);
                }
            }
        }
    });
    for (std::int64_t item = 0; item + 1 < parts; ++item) {
        for (std::int64_t i = 0; i < p.count * bins; ++i) {
            p.counts[i] += tables[static_cast<std::size_t>(item * p.count * bins + i)];
        }
    }
}

std::int64_t magnitude_place_cpu(const MatrixView& base, const MatrixView& expert, std::uint32_t key, std::int64_t left,
                                 std::int64_t numel) {
    for (std::int64_t begin = 0; begin < numel; begin += least) {
        std::int64_t found = -1;
        for_each_key_block(base, expert, begin, std::min(numel, begin + least),
                           [&](const std::uint32_t* keys, std::int64_t n, std::int64_t at) {
                               for (std::int64_t i = 0; i < n && left > 0; ++i) {
                                   if (keys[i] == key && --left == 0) found = at + i + 1;
                               }
                           });
        if (found >= 0) return found;
    }
    return numel;
}

}  // namespace pymerge
