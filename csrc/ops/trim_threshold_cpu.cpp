#include "ops/trim_threshold.h"

#include <array>
#include <vector>

#include "common/check.h"
#include "common/magnitude_blocks.h"

namespace pymerge {
namespace {

constexpr std::int64_t segment = 128 * magnitude_block;  // what is counted in one table

struct Digit {
    int shift;
    int bits;
};
// Of all bits of a key, from the top.
template <class A>
constexpr std::array<Digit, 3> digits{{{20, 11}, {10, 10}, {0, 10}}};
template <>
constexpr std::array<Digit, 6> digits<double>{{{52, 11}, {41, 11}, {30, 11}, {20, 10}, {10, 10}, {0, 10}}};
constexpr std::size_t bins = 1 << 11;

using Table = std::array<std::uint32_t, bins>;

// The selection of one task, digit by digit from the top. Its deltas are A's.
template <class A>
class Search {
  public:
    Search(const TrimThresholdParams& p, std::int64_t task)
        : p_(p),
          expert_(p.experts[task]),
          left_(p.counts[task]),
          tables_(static_cast<std::size_t>(chunk_count(p.numel, segment))) {}

    // Counts a digit in one segment.
    void count(std::size_t place, Digit digit) {
        Table& table = tables_[place];
        table.fill(0);
        if (digit.shift == digits<A>[0].shift) {
            count_first_digit(place, table);
        } else {
            count_digit(place, digit, table);
        }
    }

    // Decides the digit that all segments have been counted by.
    void settle(Digit digit) {
        bin_ = std::size_t{1} << digit.bits;
        do {
            --bin_;
            equal_ = 0;
            for (const Table& table : tables_) equal_ += table[bin_];
            left_ -= equal_;
        } while (left_ > 0);
        left_ += equal_;
        prefix_ = (prefix_ << digit.bits) | static_cast<Key>(bin_);
    }

    std::int64_t key() const { return static_cast<std::int64_t>(prefix_); }

    std::int64_t end() const {
        if (left_ == equal_) return p_.numel;
        std::int64_t left = left_;
        std::size_t place = 0;
        while (tables_[place][bin_] < left) left -= tables_[place++][bin_];
        return behind_tie(place, left);
    }

  private:
    using Key = MagnitudeKey<A>;

    // Calls f(keys, n, at) for each block of a segment.
    template <class F>
    void for_each_block(std::size_t place, F&& f) const {
        const std::int64_t begin = static_cast<std::int64_t>(place) * segment;
        for_each_key_block<A>(p_.base, expert_, begin, std::min(p_.numel, begin + segment), f);
    }

    void count_first_digit(std::size_t place, Table& table) const {
        constexpr int shift = digits<A>[0].shift;
        // Two tables: neighbours often fall into the same bin, and would wait for each other's store.
        Table other{};
        for_each_block(place, [&](const Key* keys, std::int64_t n, std::int64_t) {
            std::int64_t i = 0;
            for (; i + 1 < n; i += 2) {
                ++table[keys[i] >> shift];
                ++other[keys[i + 1] >> shift];
            }
            if (i < n) ++table[keys[i] >> shift];
        });
        for (std::size_t bin = 0; bin < bins; ++bin) table[bin] += other[bin];
    }

    void count_digit(std::size_t place, Digit digit, Table& table) const {
        const Key mask = (Key{1} << digit.bits) - 1;
        for_each_block(place, [&](const Key* keys, std::int64_t n, std::int64_t) {
            for_each_matching(keys, n, prefix_, digit.shift + digit.bits,
                              [&](Key key) { ++table[(key >> digit.shift) & mask]; });
        });
    }

    // Index behind the left-th element of the key in a segment.
    std::int64_t behind_tie(std::size_t place, std::int64_t left) const {
        std::int64_t end = 0;
        for_each_block(place, [&](const Key* keys, std::int64_t n, std::int64_t at) {
            for (std::int64_t i = 0; i < n && left > 0; ++i) {
                if (keys[i] == prefix_ && --left == 0) end = at + i + 1;
            }
        });
        return end;
    }

    const TrimThresholdParams& p_;
    const MatrixView& expert_;
    std::int64_t left_;       // elements to be taken among those that start with the prefix
    std::int64_t equal_ = 0;  // how many those are
    Key prefix_ = 0;
    std::size_t bin_ = 0;  // the prefix's last digit
    std::vector<Table> tables_;
};

// Finds the thresholds of these tasks, whose deltas are A's.
template <class A>
void find_thresholds(const TrimThresholdParams& p, const std::vector<std::int64_t>& tasks, int threads) {
    std::vector<Search<A>> searches;
    for (const std::int64_t task : tasks) searches.emplace_back(p, task);
    const auto count = static_cast<std::int64_t>(tasks.size()), segments = chunk_count(p.numel, segment);
    for (const Digit digit : digits<A>) {
        // Tasks take turns, so that the base's segment is still in the cache.
        for_each_item(segments * count, threads, [&](std::int64_t item) {
            searches[static_cast<std::size_t>(item % count)].count(static_cast<std::size_t>(item / count), digit);
        });
        for (Search<A>& search : searches) search.settle(digit);
    }
    for (std::size_t i = 0; i < tasks.size(); ++i) {
        p.keys[tasks[i]] = searches[i].key();
        p.ends[tasks[i]] = searches[i].end();
    }
}

}  // namespace

void trim_threshold_cpu(const TrimThresholdParams& p, int threads) {
    std::vector<std::int64_t> in_float, in_double;
    for (std::int64_t t = 0; t < p.count; ++t) {
        PM_CHECK(0 < p.counts[t] && p.counts[t] < p.numel,
                 "trim_threshold: count " << p.counts[t] << " of " << p.numel << " elements");
        (is_double_delta(p.base, p.experts[t]) ? in_double : in_float).push_back(t);
    }
    find_thresholds<float>(p, in_float, threads);
    find_thresholds<double>(p, in_double, threads);
}

}  // namespace pymerge
