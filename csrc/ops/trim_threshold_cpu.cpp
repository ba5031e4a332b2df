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
constexpr std::array<Digit, 3> digits{{{20, 11}, {10, 10}, {0, 10}}};  // of 31 bits, from the top
constexpr std::size_t bins = 1 << 11;

using Table = std::array<std::uint32_t, bins>;

// Calls f(keys, n, at) for each block of a segment of one task.
template <class F>
void for_each_block(const TrimThresholdParams& p, std::int64_t task, std::int64_t begin, F&& f) {
    for_each_key_block(p.base, p.experts[task], begin, std::min(p.numel, begin + segment), f);
}

void count_first_digit(const TrimThresholdParams& p, std::int64_t task, std::int64_t begin, Table& table) {
    // Two tables: neighbours often fall into the same bin, and would wait for each other's store.
    Table other{};
    for_each_block(p, task, begin, [&](const std::uint32_t* keys, std::int64_t n, std::int64_t) {
        std::int64_t i = 0;
        for (; i + 1 < n; i += 2) {
            ++table[keys[i] >> digits[0].shift];
            ++other[keys[i + 1] >> digits[0].shift];
        }
        if (i < n) ++table[keys[i] >> digits[0].shift];
    });
    for (std::size_t bin = 0; bin < bins; ++bin) table[bin] += other[bin];
}

void count_digit(const TrimThresholdParams& p, std::int64_t task, std::int64_t begin, std::uint32_t prefix, Digit digit,
                 Table& table) {
    const std::uint32_t mask = (1u << digit.bits) - 1;
    for_each_block(p, task, begin, [&](const std::uint32_t* keys, std::int64_t n, std::int64_t) {
        for_each_matching(keys, n, prefix, digit.shift + digit.bits,
                          [&](std::uint32_t key) { ++table[(key >> digit.shift) & mask]; });
    });
}

// Index behind the left-th element of this key in a segment.
std::int64_t behind_tie(const TrimThresholdParams& p, std::int64_t task, std::int64_t begin, std::uint32_t key,
                        std::int64_t left) {
    std::int64_t end = 0;
    for_each_block(p, task, begin, [&](const std::uint32_t* keys, std::int64_t n, std::int64_t at) {
        for (std::int64_t i = 0; i < n && left > 0; ++i) {
            if (keys[i] == key && --left == 0) end = at + i + 1;
        }
    });
    return end;
}

// The selection of one task, digit by digit from the top.
class Search {
  public:
    Search(std::int64_t count, std::int64_t segments) : left_(count), tables_(static_cast<std::size_t>(segments)) {}

    void count(const TrimThresholdParams& p, std::int64_t task, std::size_t place, Digit digit) {
        Table& table = tables_[place];
        table.fill(0);
        const std::int64_t begin = static_cast<std::int64_t>(place) * segment;
        if (digit.shift == digits[0].shift) {
            count_first_digit(p, task, begin, table);
        } else {
            count_digit(p, task, begin, prefix_, digit, table);
        }
    }

    void settle(Digit digit) {
        bin_ = std::size_t{1} << digit.bits;
        do {
            --bin_;
            equal_ = 0;
            for (const Table& table : tables_) equal_ += table[bin_];
            left_ -= equal_;
        } while (left_ > 0);
        left_ += equal_;
        prefix_ = (prefix_ << digit.bits) | static_cast<std::uint32_t>(bin_);
    }

    std::int64_t key() const { return prefix_; }

    std::int64_t end(const TrimThresholdParams& p, std::int64_t task) const {
        if (left_ == equal_) return p.numel;
        std::int64_t left = left_;
        std::size_t place = 0;
        while (tables_[place][bin_] < left) left -= tables_[place++][bin_];
        return behind_tie(p, task, static_cast<std::int64_t>(place) * segment, prefix_, left);
    }

  private:
    std::int64_t left_;       // elements to be taken among those that start with the prefix
    std::int64_t equal_ = 0;  // how many those are
    std::uint32_t prefix_ = 0;
    std::size_t bin_ = 0;  // the prefix's last digit
    std::vector<Table> tables_;
};

}  // namespace

void trim_threshold_cpu(const TrimThresholdParams& p, int threads) {
    for (std::int64_t t = 0; t < p.count; ++t) {
        PM_CHECK(0 < p.counts[t] && p.counts[t] < p.numel,
                 "trim_threshold: count " << p.counts[t] << " of " << p.numel << " elements");
        PM_CHECK(p.base.dtype != DType::f64 && p.experts[t].dtype != DType::f64,
                 "trim_threshold: an input is float64; use the reference");
    }
    const std::int64_t segments = chunk_count(p.numel, segment);
    std::vector<Search> searches;
    for (std::int64_t t = 0; t < p.count; ++t) searches.emplace_back(p.counts[t], segments);
    for (const Digit digit : digits) {
        // Tasks take turns, so that the base's segment is still in the cache.
        for_each_item(segments * p.count, threads, [&](std::int64_t item) {
            const std::int64_t task = item % p.count;
            searches[static_cast<std::size_t>(task)].count(p, task, static_cast<std::size_t>(item / p.count), digit);
        });
        for (Search& search : searches) search.settle(digit);
    }
    for (std::int64_t t = 0; t < p.count; ++t) {
        const Search& search = searches[static_cast<std::size_t>(t)];
        p.keys[t] = search.key();
        p.ends[t] = search.end(p, t);
    }
}

}  // namespace pymerge
