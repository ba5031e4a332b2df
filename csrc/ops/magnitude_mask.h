// Masks that keep a range of magnitudes of each task vector, and its L1 norms before and after.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/task_delta.h"

namespace pymerge {

struct MaskOutput {
    std::uint8_t* bits;  // count rows of mask_bytes(numel); see common/bitmask.h
    double* before;      // [count]: sum of |tau|; or null: nobody wants the norms
    double* after;       // [count]: the same over what is kept
};

// The selected elements of each task: a key above keys[t], or equal to it at an index below ends[t].
struct Selection {
    const std::int64_t* keys;
    const std::int64_t* ends;
};

// Of one task, whose deltas are A's, and the elements from some index on: those with a key in (below, last], where the
// bounds are one lower for elements before an end. As signed numbers, which all keys fit.
template <class A>
struct KeyRange {
    using Number = std::make_signed_t<MagnitudeKey<A>>;
    static constexpr std::int64_t largest = std::numeric_limits<Number>::max();

    Number below, last;
    Number below_end, last_end;

    // The same, with indices that count from another element on.
    KeyRange from(std::int64_t begin) const {
        constexpr std::int64_t none = 0;
        return {below, last, static_cast<Number>(std::max(below_end - begin, none)),
                static_cast<Number>(std::max(last_end - begin, none))};
    }

    bool operator()(A delta, Number i) const {
        const auto key = static_cast<Number>(magnitude_key(delta));
        return (key > below - (i < below_end)) & (key <= last - (i < last_end));
    }
};

template <class A>
KeyRange<A> key_range(const Selection& kept, const Selection& dropped, std::int64_t task, std::int64_t begin) {
    using Number = typename KeyRange<A>::Number;
    constexpr std::int64_t largest = KeyRange<A>::largest;
    const auto bound = [&](const Selection& selection, Number& key, Number& end) {
        key = static_cast<Number>(std::min(selection.keys[task], largest));
        // No magnitude has a larger key than that, nor is one equal to it.
        const bool nothing = selection.keys[task] > largest;
        const std::int64_t left = nothing ? 0 : selection.ends[task] - begin;
        end = static_cast<Number>(std::clamp<std::int64_t>(left, 0, largest));
    };
    KeyRange<A> range{-1, static_cast<Number>(largest), 0, 0};
    if (kept.keys != nullptr) bound(kept, range.below, range.below_end);
    if (dropped.keys != nullptr) bound(dropped, range.last, range.last_end);
    return range;
}

struct MagnitudeMaskParams {
    MaskOutput out;
    MatrixView base;  // one row of numel elements, as the experts
    const MatrixView* experts;
    Selection kept;
    Selection dropped;  // of those kept; keys null: nothing
    std::int64_t count;
    std::int64_t numel;
};

void magnitude_mask_cpu(const MagnitudeMaskParams& p, int threads);

}  // namespace pymerge
