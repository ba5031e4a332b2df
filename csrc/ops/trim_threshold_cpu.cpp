#include "ops/trim_threshold.h"

#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "common/check.h"
#include "common/magnitude_blocks.h"

namespace pymerge {
namespace {

constexpr std::int64_t segment = 64 * magnitude_block;  // what is counted in one table
constexpr int bin_bits = 11;
constexpr std::size_t bins = std::size_t{1} << bin_bits;

// Elements that a task's key is guessed from, where there are many more: runs of neighbours.
constexpr std::int64_t run = 16;
constexpr std::int64_t least_runs = 64, most_runs = 256;
constexpr std::int64_t least_elements = 16 * least_runs * run;
constexpr std::int64_t run_every = 128 * run;  // elements, or as many runs as are allowed

// How many keys are in a part of a range, and of those all but its first key: in one number, to be added at once.
class Bin {
  public:
    void add(bool first) { both_ += one + (first ? 0 : 1); }
    void add_first(std::int64_t count) { both_ += one * static_cast<std::uint64_t>(count); }
    void operator+=(Bin other) { both_ += other.both_; }
    std::int64_t count() const { return static_cast<std::int64_t>(both_ >> 32); }
    bool one_key() const { return static_cast<std::uint32_t>(both_) == 0; }

  private:
    static constexpr std::uint64_t one = std::uint64_t{1} << 32;
    std::uint64_t both_ = 0;
};

using Table = std::array<Bin, bins>;

// The selection of one task: a range of keys that gets smaller until it is one. Its deltas are A's.
template <class A>
class Search {
  public:
    Search(const TrimThresholdParams& p, std::int64_t task)
        : p_(p),
          expert_(p.experts[task]),
          count_(p.counts[task]),
          tables_(static_cast<std::size_t>(chunk_count(p.numel, segment))),
          above_(tables_.size()) {
        set_range(0, largest);
        if (p.numel >= least_elements) guess();
    }

    bool found() const { return found_; }

    // Counts the keys of one segment.
    void count(std::size_t place) {
        Table& table = tables_[place];
        table.fill({});
        above_[place] = 0;
        // Two tables: neighbours often fall into the same bin, and would wait for each other's store.
        Table other;
        Key list[magnitude_block + keys_room];
        const Key rest = (Key{1} << shift_) - 1;
        for_each_block(place, [&](const Key* keys, std::int64_t n, std::int64_t) {
            const auto [within, above] = keys_within(list, keys, low_, high_, n);
            above_[place] += above;
            if (low_ == high_) return table[0].add_first(within);
            std::int64_t i = 0;
            for (; i + 1 < within; i += 2) {
                table[list[i] >> shift_].add((list[i] & rest) == 0);
                other[list[i + 1] >> shift_].add((list[i + 1] & rest) == 0);
            }
            if (i < within) other[list[i] >> shift_].add((list[i] & rest) == 0);
        });
        for (std::size_t bin = 0; bin < bins; ++bin) table[bin] += other[bin];
    }

    // Makes the range smaller, when all segments have been counted.
    void narrow() {
        left_ = count_ - std::accumulate(above_.begin(), above_.end(), std::int64_t{0});
        if (left_ <= 0) return set_range(high_ + 1, largest);  // the guess was wrong
        for (bin_ = bins; bin_ > 0; left_ -= equal_) {
            --bin_;
            equal_ = 0;
            for (const Table& table : tables_) equal_ += table[bin_].count();
            if (left_ > equal_) continue;
            const Key first = low_ + (static_cast<Key>(bin_) << shift_);
            found_ =
                std::all_of(tables_.begin(), tables_.end(), [&](const Table& each) { return each[bin_].one_key(); });
            return set_range(first, found_ ? first : std::min(high_, first + ((Key{1} << shift_) - 1)));
        }
        set_range(0, low_ - 1);  // it was, too
    }

    std::int64_t key() const { return static_cast<std::int64_t>(low_); }

    std::int64_t end() const {
        if (left_ == equal_) return p_.numel;
        std::int64_t left = left_;
        std::size_t place = 0;
        while (tables_[place][bin_].count() < left) left -= tables_[place++][bin_].count();
        return place_of<A>(p_.base, expert_, low_, left, static_cast<std::int64_t>(place) * segment, p_.numel);
    }

  private:
    using Key = MagnitudeKey<A>;
    static constexpr Key largest = static_cast<Key>(-1) >> 1;

    // Calls f(keys, n, at) for each block of a segment.
    template <class F>
    void for_each_block(std::size_t place, F&& f) const {
        const std::int64_t begin = static_cast<std::int64_t>(place) * segment;
        for_each_key_block<A>(p_.base, expert_, begin, std::min(p_.numel, begin + segment), f);
    }

    // Starts from the range that the key is almost surely in, by a sample. What is found does not depend on it.
    void guess() {
        const std::int64_t runs = std::clamp(p_.numel / run_every, least_runs, most_runs), stride = p_.numel / runs;
        std::vector<Key> sample;
        for (std::int64_t i = 0; i < runs; ++i) {
            // Anywhere in its part: at equal distances all might be of the same columns.
            const auto anywhere =
                static_cast<std::uint32_t>((static_cast<std::uint64_t>(i) * 0x9e3779b97f4a7c15u) >> 32);
            const std::int64_t at = i * stride + ((anywhere * (stride - run)) >> 32);
            for_each_key_block<A>(p_.base, expert_, at, at + run, [&](const Key* keys, std::int64_t n, std::int64_t) {
                sample.insert(sample.end(), keys, keys + n);
            });
        }
        const double size = static_cast<double>(sample.size()), margin = 3.0 * std::sqrt(size);
        const double middle = size * (static_cast<double>(count_) / static_cast<double>(p_.numel));
        const auto first = sample.begin() + static_cast<std::int64_t>(std::max(middle - margin, 0.0));
        const auto last = sample.begin() + static_cast<std::int64_t>(std::min(middle + margin, size - 1.0));
        std::nth_element(sample.begin(), first, sample.end(), std::greater<>());
        const Key high = middle > margin ? *first : largest;
        std::nth_element(first, last, sample.end(), std::greater<>());
        set_range(middle + margin < size ? *last : 0, high);
    }

    // Cuts the range into as many parts as there are bins, or less.
    void set_range(Key low, Key high) {
        low_ = low, high_ = high;
        shift_ = std::max(0, static_cast<int>(std::bit_width(high - low)) - bin_bits);
    }

    const TrimThresholdParams& p_;
    const MatrixView& expert_;
    std::int64_t count_;
    Key low_, high_;          // the range
    int shift_;               // of a key's distance from its beginning, to the number of the bin
    std::size_t bin_ = 0;     // that the key is in
    std::int64_t left_ = 0;   // elements to be taken of it
    std::int64_t equal_ = 0;  // how many it has
    bool found_ = false;
    std::vector<Table> tables_;        // of each segment
    std::vector<std::int64_t> above_;  // keys above the range
};

// Finds the thresholds of these tasks, whose deltas are A's.
template <class A>
void find_thresholds(const TrimThresholdParams& p, const std::vector<std::int64_t>& tasks, int threads) {
    std::vector<Search<A>> searches;
    for (const std::int64_t task : tasks) searches.emplace_back(p, task);
    std::vector<Search<A>*> open;
    for (Search<A>& search : searches) open.push_back(&search);
    while (!open.empty()) {
        const auto count = static_cast<std::int64_t>(open.size()), segments = chunk_count(p.numel, segment);
        // Tasks take turns, so that the base's segment is still in the cache.
        for_each_item(segments * count, threads, [&](std::int64_t item) {
            open[static_cast<std::size_t>(item % count)]->count(static_cast<std::size_t>(item / count));
        });
        for (Search<A>* search : open) search->narrow();
        std::erase_if(open, [](const Search<A>* search) { return search->found(); });
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
