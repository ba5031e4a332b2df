// Philox 4x32-10: four 32-bit numbers from a counter and a key, the same on every device. Source: Salmon, Moraes, Dror,
// Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. pymerge/ops/_philox.py gives the same numbers.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace pymerge {

struct PhiloxWords {
    std::uint32_t x[4];
};

constexpr int philox_rounds = 10;

constexpr PhiloxWords philox(PhiloxWords c, std::uint32_t k0, std::uint32_t k1) {
    for (int round = 0; round < philox_rounds; ++round) {
        const std::uint64_t first = std::uint64_t{0xD2511F53u} * c.x[0];
        const std::uint64_t second = std::uint64_t{0xCD9E8D57u} * c.x[2];
        c = {{static_cast<std::uint32_t>(second >> 32) ^ c.x[1] ^ k0, static_cast<std::uint32_t>(second),
              static_cast<std::uint32_t>(first >> 32) ^ c.x[3] ^ k1, static_cast<std::uint32_t>(first)}};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// The known answers that come with the authors' implementation.
constexpr bool philox_gives(PhiloxWords counter, std::uint32_t k0, std::uint32_t k1, PhiloxWords expected) {
    const PhiloxWords found = philox(counter, k0, k1);
    for (int i = 0; i < 4; ++i) {
        if (found.x[i] != expected.x[i]) return false;
    }
    return true;
}
static_assert(philox_gives({{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}));
static_assert(philox_gives({{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u, {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}));
static_assert(philox_gives({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, 0xa4093822u, 0x299f31d0u,
                           {{0xd16cfe09u, 0x94fdcceb, 0x5001e420u, 0x24126ea1u}}));

}  // namespace pymerge
