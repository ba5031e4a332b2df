// Magnitudes of a task vector as integer keys, block by block in the first-level cache.
#pragma once

#include <bit>

#include "common/bitmask.h"
#include "common/task_delta.h"

namespace pymerge {

constexpr std::int64_t magnitude_block = 2048;  // a block's delta and keys stay in the first-level cache

template <class A, class K>
PM_TARGET_CLONES static inline void find_keys(MagnitudeKey<K>* __restrict keys, const A* __restrict delta,
                                              std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) keys[i] = magnitude_key(static_cast<K>(delta[i]));
}

template <class Key>
PM_TARGET_CLONES static inline void find_matching(std::uint32_t* __restrict flags, const Key* __restrict keys,
                                                  Key prefix, int shift, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) flags[i] = (keys[i] >> shift) == prefix;
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

// Calls f(key) for the keys of a block that start with `prefix`: a key shifted right by so many bits, fewer than it
// has.
template <class Key, class F>
void for_each_matching(const Key* keys, std::int64_t n, Key prefix, int shift, F&& f) {
    std::uint32_t flags[magnitude_block];
    std::uint64_t words[magnitude_block / 64] = {};
    find_matching(flags, keys, prefix, shift, n);
    std::fill(flags + n, flags + (n + 31) / 32 * 32, 0u);
    pack_bits(reinterpret_cast<std::uint8_t*>(words), flags, n);
    for (std::int64_t place = 0; place * 64 < n; ++place) {
        for (std::uint64_t word = words[place]; word != 0; word &= word - 1) {
            f(keys[place * 64 + std::countr_zero(word)]);
        }
    }
}

}  // namespace pymerge
