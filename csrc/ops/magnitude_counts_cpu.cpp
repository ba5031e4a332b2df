#include "ops/magnitude_counts.h"

#include <vector>

#include "common/check.h"
#include "common/magnitude_blocks.h"

namespace pymerge {
namespace {

constexpr std::int64_t least = 16 * magnitude_block;  // elements that are worth a table of their own

// Counts elements begin to end of one task, whose deltas are A's, by keys that are K's.
template <class A, class K>
void count(const MagnitudeCountsParams& p, std::int64_t task, std::int64_t begin, std::int64_t end,
           std::int64_t* table) {
    using Key = MagnitudeKey<K>;
    // Digits above the bits of a key are 0; so is the key's one bit that is always 0.
    const int shift = std::min(p.shift, key_bits<K>), above = std::min(p.shift + p.bits, key_bits<K>);
    const std::uint64_t prefix = p.prefixes[task];
    if (prefix >> (key_bits<K> - above) != 0) return;  // no key starts with it
    const auto count_keys = [&](const Key* keys, std::int64_t n, std::int64_t) {
        if (above == key_bits<K>) {
            for (std::int64_t i = 0; i < n; ++i) ++table[keys[i] >> shift];
            return;
        }
        Key list[magnitude_block + keys_room];
        const Key low = static_cast<Key>(prefix) << above, high = low + ((Key{1} << above) - 1);
        const std::int64_t within = keys_within(list, keys, low, high, n).within;
        for (std::int64_t i = 0; i < within; ++i) ++table[list[i] >> shift];
    };
    for_each_key_block<A, K>(p.base, p.experts[task], begin, end, count_keys);
}

void count_task(const MagnitudeCountsParams& p, std::int64_t task, std::int64_t begin, std::int64_t end,
                std::int64_t* table) {
    in_delta_type(p.base, p.experts[task], [&](auto tag) {
        using A = typename decltype(tag)::type;
        p.in_double ? count<A, double>(p, task, begin, end, table) : count<A, A>(p, task, begin, end, table);
    });
}

}  // namespace

void magnitude_counts_cpu(const MagnitudeCountsParams& p, int threads) {
    PM_CHECK(p.bits >= 0 && p.bits <= 16 && p.shift >= 0 && p.shift + p.bits <= key_bits<double>,
             "magnitude_counts: " << p.bits << " bits from bit " << p.shift << " on, of " << key_bits<double>);
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
            for (std::int64_t task = 0; task < p.count; ++task) count_task(p, task, begin, end, table + task * bins);
        }
    });
    for (std::int64_t item = 0; item + 1 < parts; ++item) {
        for (std::int64_t i = 0; i < p.count * bins; ++i) {
            p.counts[i] += tables[static_cast<std::size_t>(item * p.count * bins + i)];
        }
    }
}

std::int64_t magnitude_place_cpu(const MatrixView& base, const MatrixView& expert, std::uint64_t key, std::int64_t left,
                                 std::int64_t numel) {
    return in_delta_type(base, expert, [&](auto tag) {
        return place_of<typename decltype(tag)::type>(base, expert, key, left, 0, numel);
    });
}

}  // namespace pymerge
