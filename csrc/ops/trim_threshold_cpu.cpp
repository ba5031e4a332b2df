#include "ops/trim_threshold.h"

#include <array>
#include <atomic>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"

namespace pymerge {
namespace {

constexpr std::int64_t block_size = 2048;           // a block's delta and keys stay in the first-level cache
constexpr std::int64_t segment = 128 * block_size;  // what one thread counts before it adds to the shared histogram

struct Digit {
    int shift;
    int bits;
};
constexpr std::array<Digit, 3> digits{{{20, 11}, {9, 11}, {0, 9}}};  // of 31 bits, from the top
constexpr std::size_t bins = 1 << 11;

using Histogram = std::vector<std::atomic<std::int64_t>>;

// Calls f(keys, n, begin) for each block of a segment of one task.
template <class F>
void for_each_block(const TrimThresholdParams& p, std::int64_t task, std::int64_t begin, F&& f) {
    const std::int64_t end = std::min(p.numel, begin + segment);
    float delta[block_size];
    std::uint32_t keys[block_size];
    for (std::int64_t at = begin; at < end; at += block_size) {
        const std::int64_t n = std::min(block_size, end - at);
        task_deltas(delta, p.base, p.experts[task], at, n);
        for (std::int64_t i = 0; i < n; ++i) keys[i] = magnitude_key(delta[i]);
        f(keys, n, at);
    }
}

// The keys that start with `prefix`, moved to the front; returns their number.
std::int64_t matching(std::uint32_t* keys, std::int64_t n, std::uint32_t prefix, int shift) {
    std::int64_t found = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const std::uint32_t key = keys[i];
        keys[found] = key;
        found += (key >> shift) == prefix;
    }
    return found;
}

void count_digits(const TrimThresholdParams& p, std::int64_t task, std::int64_t begin, std::uint32_t prefix,
                  Digit digit, Histogram& total) {
    // Two tables: neighbours often fall into the same bin, and would wait for each other's store.
    std::uint32_t tables[2][bins] = {};
    const std::uint32_t mask = (1u << digit.bits) - 1;
    const int above = digit.shift + digit.bits;
    for_each_block(p, task, begin, [&](std::uint32_t* keys, std::int64_t n, std::int64_t) {
        const std::int64_t found = above == 31 ? n : matching(keys, n, prefix, above);
        std::int64_t i = 0;
        for (; i + 1 < found; i += 2) {
            ++tables[0][(keys[i] >> digit.shift) & mask];
            ++tables[1][(keys[i + 1] >> digit.shift) & mask];
        }
        if (i < found) ++tables[0][(keys[i] >> digit.shift) & mask];
    });
    for (std::size_t bin = 0; bin <= mask; ++bin) {
        const std::int64_t sum = std::int64_t{tables[0][bin]} + tables[1][bin];
        if (sum > 0) total[bin].fetch_add(sum, std::memory_order_relaxed);
    }
}

PM_TARGET_CLONES std::int64_t count_equal(const std::uint32_t* keys, std::int64_t n, std::uint32_t key) {
    std::uint32_t equal = 0;
    for (std::int64_t i = 0; i < n; ++i) equal += keys[i] == key;
    return equal;
}

// Index behind the left-th element of this key.
std::int64_t behind_tie(const TrimThresholdParams& p, std::int64_t task, std::uint32_t key, std::int64_t left,
                        const std::int64_t* ties) {
    std::int64_t place = 0;
    while (ties[place] < left) left -= ties[place++];
    std::int64_t end = 0;
    for_each_block(p, task, place * segment, [&](const std::uint32_t* keys, std::int64_t n, std::int64_t begin) {
        for (std::int64_t i = 0; i < n && left > 0; ++i) {
            if (keys[i] == key && --left == 0) end = begin + i + 1;
        }
    });
    return end;
}

}  // namespace

void trim_threshold_cpu(const TrimThresholdParams& p, int threads) {
    for (std::int64_t t = 0; t < p.count; ++t) {
        PM_CHECK(0 < p.counts[t] && p.counts[t] < p.numel,
                 "trim_threshold: count " << p.counts[t] << " of " << p.numel << " elements");
        PM_CHECK(p.base.dtype != DType::f64 && p.experts[t].dtype != DType::f64,
                 "trim_threshold: an input is float64; use the reference");
    }
    const std::int64_t segments = chunk_count(p.numel, segment);
    std::vector<std::uint32_t> prefixes(static_cast<std::size_t>(p.count), 0);
    std::vector<std::int64_t> left(p.counts, p.counts + p.count);
    std::vector<std::int64_t> equal(static_cast<std::size_t>(p.count), 0);
    for (const Digit digit : digits) {
        std::vector<Histogram> totals;
        for (std::int64_t t = 0; t < p.count; ++t) totals.emplace_back(bins);
        // Tasks take turns, so that the base's segment is still in the cache.
        for_each_item(segments * p.count, threads, [&](std::int64_t item) {
            const auto task = static_cast<std::size_t>(item % p.count);
            count_digits(p, item % p.count, item / p.count * segment, prefixes[task], digit, totals[task]);
        });
        for (std::size_t t = 0; t < totals.size(); ++t) {
            std::size_t bin = (std::size_t{1} << digit.bits) - 1;
            while (totals[t][bin] < left[t]) left[t] -= totals[t][bin--];
            prefixes[t] = (prefixes[t] << digit.bits) | static_cast<std::uint32_t>(bin);
            equal[t] = totals[t][bin];
        }
    }
    std::vector<std::int64_t> ties(static_cast<std::size_t>(segments * p.count), 0);
    for_each_item(segments * p.count, threads, [&](std::int64_t item) {
        const std::int64_t task = item % p.count, place = item / p.count;
        const auto t = static_cast<std::size_t>(task);
        if (equal[t] == left[t]) return;
        std::int64_t& sum = ties[static_cast<std::size_t>(task * segments + place)];
        for_each_block(p, task, place * segment, [&](const std::uint32_t* keys, std::int64_t n, std::int64_t) {
            sum += count_equal(keys, n, prefixes[t]);
        });
    });
    for (std::int64_t task = 0; task < p.count; ++task) {
        const auto t = static_cast<std::size_t>(task);
        p.keys[task] = prefixes[t];
        p.ends[task] = equal[t] == left[t] ? p.numel
                                           : behind_tie(p, task, prefixes[t], left[t], ties.data() + task * segments);
    }
}

}  // namespace pymerge
