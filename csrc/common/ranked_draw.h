// Which elements of a row a draw keeps whose probabilities grow with the rank of the magnitude.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>
#include <vector>

#include "common/draw_segments.h"
#include "common/dtype.h"
#include "common/list_between.h"
#include "common/magnitude_buckets.h"

namespace pymerge {

// Few elements need their rank. Numbers below the lowest limit are kept, those not below the highest are not; between
// them an element's bucket, of about equal magnitudes, tells between which ranks it lies, and mostly that is enough,
// often with no more of the number than its leading bits.
// Where it is not, but the bucket holds a single magnitude, as most do for differences of 16-bit numbers, ranks are in
// the order of the elements. For the rest the smaller elements are counted: of the row for a few such elements, of
// their buckets for many.
class RankedDraw {
  public:
    // Limits, as many as columns, ascend; they must outlive the draw.
    RankedDraw(const std::uint64_t* limits, std::int64_t columns)
        : limits_(limits),
          columns_(columns),
          segments_(limits, columns),
          bits_(std::clamp(static_cast<int>(std::bit_width(static_cast<std::uint64_t>(columns))) - 6, 2, 12)),
          count_(octaves << bits_),
          buckets_(static_cast<std::size_t>(columns)),
          before_(static_cast<std::size_t>(columns)),
          open_(static_cast<std::size_t>(columns + list_room)),
          listed_(static_cast<std::size_t>(columns + list_room)),
          places_(static_cast<std::size_t>(parts * count_)),
          starts_(static_cast<std::size_t>(count_) + 1),
          mixed_(static_cast<std::size_t>(count_)),
          settled_(static_cast<std::size_t>(count_)) {}

    // flags[i] = words[i] < limits[rank of |delta[i]|], with ranks from the smallest, equal ones by ascending index.
    void operator()(std::uint32_t* flags, const float* delta, const std::uint32_t* words) {
        std::int64_t open = 0;
        if (draws_by_segment()) {
            fill_buckets(delta);
            open = settle_by_order(flags, words, decide(flags, words, draw_by_segment(flags, words)));
        } else {
            open = find_open(flags, words);
            if (open > few) {
                fill_buckets(delta);
                open = settle_by_order(flags, words, decide(flags, words, open));
            }
        }
        if (open > few) {
            sort_by_bucket(delta);
            for (std::int64_t each = 0; each < open; ++each) settle_by_bucket(flags, delta, words, open_[each]);
        } else {
            for (std::int64_t each = 0; each < open; ++each) {
                const std::uint32_t i = open_[each];
                flags[i] = words[i] < limits_[rank(delta, i)];
            }
        }
    }

  private:
    static constexpr std::int64_t few = 32;
    static constexpr std::int64_t large_bucket = 512;
    // That have buckets of their own.
    static constexpr std::uint32_t octaves = 8;
    // Parts of a row that are counted by themselves: one counter would have to wait for its last step.
    static constexpr std::int64_t parts = 4;

    // Flags by the limit that holds for all; lists the elements for which others matter.
    std::int64_t find_open(std::uint32_t* flags, const std::uint32_t* words) {
        const std::uint64_t lowest = limits_[0];
        if (lowest >> 32 || is_any_number()) {  // probability 1 for all, or from 0 to 1
            std::fill_n(flags, columns_, lowest >> 32);
            std::iota(open_.begin(), open_.end(), 0u);
            return lowest >> 32 ? 0 : columns_;
        }
        return list_between(flags, open_.data(), words, segments_.lowest, segments_.between, columns_);
    }

    bool is_any_number() const { return (limits_[columns_ - 1] - limits_[0]) >> 32; }

    // Whether so many elements are about to be open that it is worth to look at all buckets first.
    bool draws_by_segment() const {
#if defined(PM_AVX512)
        const std::uint64_t expected = segments_.between * static_cast<std::uint64_t>(columns_) >> 32;
        return has_avx512() && !is_any_number() && !(limits_[0] >> 32) && expected > 2 * few;
#else
        return false;
#endif
    }

    // Flags by the segments; lists the elements of which these do not tell.
    std::int64_t draw_by_segment([[maybe_unused]] std::uint32_t* flags, [[maybe_unused]] const std::uint32_t* words) {
        std::int64_t found = 0;
#if defined(PM_AVX512)
        const std::int64_t done = columns_ / 16 * 16;
        found = draw_by_segment_avx512(flags, open_.data(), words, buckets_.data(), starts_.data(), count_, segments_,
                                       done);
        found += list_between_anywhere(flags, open_.data() + found, words, segments_.lowest, segments_.between, done,
                                       columns_);
#endif
        return found;
    }

    PM_TARGET_CLONES static std::uint32_t largest_magnitude(const float* delta, std::int64_t n) {
        std::uint32_t largest = 0;
        for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude_bits(delta[i]));
        return largest;
    }

    void fill_buckets(const float* delta) {
        const int shift = 23 - bits_;
        const auto highest = static_cast<std::int32_t>(largest_magnitude(delta, columns_) >> shift);
        const BucketScale scale{shift, highest - static_cast<std::int32_t>(count_) + 1};
        const std::int64_t listed = find_buckets(buckets_.data(), listed_.data(), delta, scale, columns_);
        std::fill(mixed_.begin(), mixed_.end(), false);
        for (std::int64_t each = 0; each < listed; ++each) mixed_[buckets_[listed_[each]]] = true;
        std::fill(places_.begin(), places_.end(), 0u);
        std::uint32_t *sizes = places_.data(), *before = before_.data();
        for_each_element([&](std::int64_t i, std::int64_t place) { before[i] = sizes[place]++; });
        std::uint32_t* starts = starts_.data();
        add_parts(starts, sizes, count_);
        std::uint32_t start = 0;
        for (std::int64_t bucket = 0; bucket < count_; ++bucket) {
            const std::uint32_t size = starts[bucket];
            starts[bucket] = start;
            start += size;
        }
        starts[count_] = start;
    }

    // Calls f(i, place of its part and bucket in `places_`) for all elements, those of a part in their order.
    template <class F>
    void for_each_element(F&& f) const {
        const std::int64_t height = columns_ / parts;
        const std::uint32_t* buckets = buckets_.data();
        for (std::int64_t i = 0; i < height; ++i) {
            for (std::int64_t part = 0; part < parts; ++part) {
                const std::int64_t at = part * height + i;
                f(at, part * count_ + buckets[at]);
            }
        }
        for (std::int64_t at = parts * height; at < columns_; ++at) f(at, (parts - 1) * count_ + buckets[at]);
    }

    PM_TARGET_CLONES static void add_parts(std::uint32_t* __restrict sums, const std::uint32_t* __restrict sizes,
                                           std::int64_t count) {
        for (std::int64_t i = 0; i < count; ++i) {
            sums[i] = sizes[i] + sizes[count + i] + sizes[2 * count + i] + sizes[3 * count + i];
        }
    }

    // Flags by the limits of the buckets; lists the elements that they leave open. Without branches, which no processor
    // could predict.
    std::int64_t decide(std::uint32_t* __restrict flags, const std::uint32_t* __restrict words, std::int64_t open) {
        const std::uint64_t* limits = limits_;
        const std::uint32_t *starts = starts_.data(), *buckets = buckets_.data();
        std::uint32_t* list = open_.data();
        std::int64_t left = 0;
        for (std::int64_t each = 0; each < open; ++each) {
            const std::uint32_t i = list[each], bucket = buckets[i];
            const std::uint64_t word = words[i];
            const bool kept = word < limits[starts[bucket]];
            flags[i] = kept;
            list[left] = i;
            left += !kept & (word < limits[starts[bucket + 1] - 1]);
        }
        return left;
    }

    // Flags the elements whose bucket holds a single magnitude; lists the others.
    std::int64_t settle_by_order(std::uint32_t* flags, const std::uint32_t* words, std::int64_t open) {
        const std::int64_t height = std::max<std::int64_t>(columns_ / parts, 1);
        std::int64_t left = 0;
        for (std::int64_t each = 0; each < open; ++each) {
            const std::uint32_t i = open_[each], bucket = buckets_[i];
            if (mixed_[bucket]) {
                open_[left++] = i;
                continue;
            }
            std::uint32_t rank = starts_[bucket] + before_[i];
            const std::int64_t own = std::min(i / height, parts - 1);
            for (std::int64_t part = 0; part < own; ++part) rank += places_[part * count_ + bucket];
            flags[i] = words[i] < limits_[rank];
        }
        return left;
    }

    // Ordered by magnitude, then by index.
    static std::uint64_t item(const float* delta, std::int64_t i) {
        return static_cast<std::uint64_t>(magnitude_bits(delta[i])) << 32 | static_cast<std::uint64_t>(i);
    }

    // Items bucket by bucket, in each in the order of their index.
    void sort_by_bucket(const float* delta) {
        for (std::int64_t bucket = 0; bucket < count_; ++bucket) {
            std::uint32_t start = starts_[bucket];
            for (std::int64_t part = 0; part < parts; ++part) {
                const std::uint32_t size = places_[part * count_ + bucket];
                places_[part * count_ + bucket] = start;
                start += size;
            }
        }
        items_.resize(static_cast<std::size_t>(columns_));
        std::fill(settled_.begin(), settled_.end(), false);
        std::uint32_t* places = places_.data();
        std::uint64_t* items = items_.data();
        for_each_element([&](std::int64_t i, std::int64_t place) { items[places[place]++] = item(delta, i); });
    }

    PM_TARGET_CLONES static std::int64_t count_below(const std::uint64_t* items, std::uint64_t limit, std::int64_t n) {
        std::int64_t count = 0;
        for (std::int64_t i = 0; i < n; ++i) count += items[i] < limit;
        return count;
    }

    // Flags an element, and in a large bucket all others, too.
    void settle_by_bucket(std::uint32_t* flags, const float* delta, const std::uint32_t* words, std::uint32_t i) {
        const std::uint32_t bucket = buckets_[i], begin = starts_[bucket], end = starts_[bucket + 1];
        std::uint64_t* items = items_.data();
        if (end - begin <= large_bucket) {
            flags[i] = words[i] < limits_[begin + count_below(items + begin, item(delta, i), end - begin)];
        } else if (!settled_[bucket]) {
            settled_[bucket] = true;
            if (!std::is_sorted(items + begin, items + end)) std::sort(items + begin, items + end);
            for (std::uint32_t rank = begin; rank < end; ++rank) {
                const auto at = static_cast<std::uint32_t>(items[rank]);
                flags[at] = words[at] < limits_[rank];
            }
        }
    }

    // How many are smaller than `size`, or, up to and with element `end`, not larger.
    PM_TARGET_CLONES static std::uint32_t count_before(const float* delta, std::uint32_t size, std::int64_t end,
                                                       std::int64_t n) {
        std::uint32_t count = 0;
        for (std::int64_t i = 0; i < end; ++i) count += magnitude_bits(delta[i]) <= size;
        for (std::int64_t i = end; i < n; ++i) count += magnitude_bits(delta[i]) < size;
        return count;
    }

    std::uint32_t rank(const float* delta, std::uint32_t i) const {
        return count_before(delta, magnitude_bits(delta[i]), i, columns_);
    }

    const std::uint64_t* limits_;  // of each rank
    std::int64_t columns_;
    DrawSegments segments_;
    int bits_;
    std::int64_t count_;                  // of buckets
    std::vector<std::uint32_t> buckets_;  // of each element
    std::vector<std::uint32_t> before_;   // how many of the same bucket are before each element in its part
    std::vector<std::uint32_t> open_;     // elements whose rank matters
    std::vector<std::uint32_t> listed_;   // elements that need not be the only magnitude of their bucket
    std::vector<std::uint32_t> places_;   // [parts, buckets]: sizes, later where the next item goes
    std::vector<std::uint32_t> starts_;   // [buckets + 1]: how many elements are in lower buckets
    std::vector<std::uint64_t> items_;    // bucket by bucket
    std::vector<char> mixed_;             // of each bucket: whether it may hold several magnitudes
    std::vector<char> settled_;           // of each bucket: whether its elements have their flags
};

}  // namespace pymerge
