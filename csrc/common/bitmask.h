// Masks of a bit an element: element i is bit i % 8 of byte i / 8, rows are whole 64-bit words. Little-endian hosts.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "common/parallel.h"

namespace pymerge {

static_assert(std::endian::native == std::endian::little, "masks are written as words, bytes in order");

inline std::int64_t mask_bytes(std::int64_t numel) { return (numel + 63) / 64 * 8; }

// Writes n flags (0 or 1) as bits, in whole words of 32; flags behind n must be there, and 0, up to a multiple of 32.
PM_TARGET_CLONES static inline void pack_bits(std::uint8_t* __restrict to, const std::uint32_t* __restrict flags,
                                              std::int64_t n) {
    for (std::int64_t begin = 0; begin < n; begin += 32) {
        std::uint32_t word = 0;
        for (std::uint32_t i = 0; i < 32; ++i) word |= flags[begin + i] << i;
        memcpy(to + begin / 8, &word, sizeof(word));
    }
}

// Reads n bits as 0 or 1, in whole words of 32: room for a multiple of 32 must be there.
template <class A>
PM_TARGET_CLONES static inline void unpack_bits(A* __restrict to, const std::uint8_t* __restrict from, std::int64_t n) {
    for (std::int64_t begin = 0; begin < n; begin += 32) {
        std::uint32_t word;
        memcpy(&word, from + begin / 8, sizeof(word));
        for (std::uint32_t i = 0; i < 32; ++i) {
            to[begin + i] = static_cast<A>(static_cast<std::int32_t>((word >> i) & 1u));
        }
    }
}

}  // namespace pymerge
