// sha256 of equal parts of a buffer, several at a time in the lanes of AVX-512 registers. Source: FIPS 180-4.
#pragma once

#include <cstdint>

namespace pymerge {

constexpr std::int64_t digest_bytes = 32;

struct PartDigestsParams {
    std::uint8_t* digests;  // of each part
    const std::uint8_t* data;
    std::int64_t nbytes;
    std::int64_t part;  // bytes of all parts but the last, which may be shorter; a multiple of 64
};

// Hashes as many parts, the first ones, as this processor hashes faster so than one by one; their number.
std::int64_t part_digests_cpu(const PartDigestsParams& p);

}  // namespace pymerge
