// Magnitudes of a task vector as integer keys, block by block in the first-level cache.
#pragma once

#include "common/avx512.h"
#include "common/parallel.h"
#include "common/task_delta.h"

namespace pymerge {

constexpr std::int64_t magnitude_block = 2048;  // a block's delta and keys stay in the first-level cache
constexpr std::int64_t keys_room = 16;          // of entries behind the last one of a list, which may be written to

template <class A, class K>
PM_TARGET_CLONES static inline void find_keys(MagnitudeKey<K>* __restrict keys, const A* __restrict delta,
                                              std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) keys[i] = magnitude_key(static_cast<K>(delta[i]));
}

// Calls f(keys, n, at) for each block of elements begin to end of one task. Deltas are formed in A, the keys are K's.
template <class A, class K = A, class F>
void for_each_key_block(const MatrixView& base, const MatrixView& expert, std::int64_t begin, std::int64_t end, F&& f) {
    A delta[magnitude_block];
    MagnitudeKey<K> keys[magnitude_block];
    for (std::int64_t at = begin; at < end; at += magnitude_block) {
        const std::int64_t n = std::min(magnitude_block, end - at);
        task_deltas(delta, base, expert, at, n);
        find_keys<A, K>(keys, delta, n);
        f(keys, n, at);
    }
}

// How many keys of a row are in a range, and above it.
struct KeyCounts {
    std::int64_t within = 0;
    std::int64_t above = 0;
};

// Lists key - low of the keys with low <= key <= high, from key `first` on.
template <class Key>
KeyCounts keys_within_anywhere(Key* __restrict list, const Key* __restrict keys, Key low, Key high, std::int64_t first,
                               std::int64_t n) {
    KeyCounts found;
    for (std::int64_t i = first; i < n; ++i) {
        list[found.within] = keys[i] - low;
        found.within += keys[i] - low <= high - low;
        found.above += keys[i] > high;
    }
    return found;
}

#if defined(PM_AVX512)

// The same, of the first n / 16 * 16.
__attribute__((target("arch=x86-64-v4"))) static inline KeyCounts keys_within_avx512(
    std::uint32_t* __restrict list, const std::uint32_t* __restrict keys, std::uint32_t low, std::uint32_t high,
    std::int64_t n) {
    const __m512i lowest = _mm512_set1_epi32(static_cast<int>(low));
    const __m512i highest = _mm512_set1_epi32(static_cast<int>(high));
    const __m512i width = _mm512_set1_epi32(static_cast<int>(high - low));
    KeyCounts found;
    for (std::int64_t i = 0; i + 16 <= n; i += 16) {
        const __m512i key = _mm512_loadu_si512(keys + i), place = _mm512_sub_epi32(key, lowest);
        const __mmask16 within = _mm512_cmple_epu32_mask(place, width);
        found.above += __builtin_popcount(_mm512_cmpgt_epu32_mask(key, highest));
        _mm512_storeu_si512(list + found.within, _mm512_maskz_compress_epi32(within, place));
        found.within += __builtin_popcount(within);
    }
    return found;
}

#endif

// Lists key - low of the keys with low <= key <= high, in their order. `list` has room for n + keys_room keys.
template <class Key>
KeyCounts keys_within(Key* list, const Key* keys, Key low, Key high, std::int64_t n) {
    std::int64_t done = 0;
    KeyCounts found;
#if defined(PM_AVX512)
    if constexpr (sizeof(Key) == sizeof(std::uint32_t)) {
        if (has_avx512()) {
            done = n / 16 * 16;
            found = keys_within_avx512(list, keys, low, high, done);
        }
    }
#endif
    const KeyCounts rest = keys_within_anywhere(list + found.within, keys, low, high, done, n);
    return {found.within + rest.within, found.above + rest.above};
}

// Index behind the left-th element with this key, counted from element `begin` on; numel where there are not so many.
template <class A>
std::int64_t place_of(const MatrixView& base, const MatrixView& expert, std::uint64_t key, std::int64_t left,
                      std::int64_t begin, std::int64_t numel) {
    using Key = MagnitudeKey<A>;
    if (key >> key_bits<A> != 0) return numel;  // no element has it
    const Key wanted = static_cast<Key>(key);
    std::int64_t place = numel;
    Key list[magnitude_block + keys_room];
    for (std::int64_t block = begin; block < numel && left > 0; block += magnitude_block) {
        const std::int64_t end = std::min(numel, block + magnitude_block);
        for_each_key_block<A>(base, expert, block, end, [&](const Key* keys, std::int64_t n, std::int64_t at) {
            const std::int64_t ties = keys_within(list, keys, wanted, wanted, n).within;
            if (ties < left) {
                left -= ties;
                return;
            }
            for (std::int64_t i = 0; left > 0; ++i) {
                left -= keys[i] == wanted;
                place = at + i + 1;
            }
        });
    }
    return place;
}

}  // namespace pymerge
