#include "io/part_digests.h"

#include <algorithm>
#include <cstring>

#include "common/avx512.h"
#include "common/check.h"

namespace pymerge {
namespace {

#if defined(PM_AVX512)

#define PM_LANES __attribute__((target("arch=x86-64-v4"), always_inline)) static inline

// GCC 12 takes what its own intrinsics leave undefined for a mistake (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

constexpr std::int64_t block = 64;  // bytes
constexpr int words = 16, state_words = 8, rounds = 64;
// Fewer than so many are done as fast by the processor's instructions for sha256, one by one.
constexpr std::int64_t least_parts = 5;

// Fractional parts of the cube roots, and of the square roots, of the first primes.
constexpr std::uint32_t constants[rounds] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
constexpr std::uint32_t start[state_words] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                              0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

// Eight lanes, or sixteen: the same operations on registers of either width.
struct Eight {
    using V = __m256i;
    static constexpr int lanes = 8;
    PM_LANES V all(std::uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
    PM_LANES V add(V a, V b) { return _mm256_add_epi32(a, b); }
    template <int n>
    PM_LANES V turn(V a) {
        return _mm256_ror_epi32(a, n);
    }
    template <int n>
    PM_LANES V shift(V a) {
        return _mm256_srli_epi32(a, n);
    }
    template <int table>
    PM_LANES V bits(V a, V b, V c) {
        return _mm256_ternarylogic_epi32(a, b, c, table);
    }
    PM_LANES void store(std::uint32_t* to, V a) { _mm256_storeu_si256(reinterpret_cast<V*>(to), a); }

    // message[i] has word i of each lane's block, most significant byte first.
    PM_LANES void load(V* message, const std::uint8_t* const* from, std::int64_t at) {
        const V swap = _mm256_broadcastsi128_si256(_mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
        for (int half = 0; half < 2; ++half) {
            V pairs[lanes], fours[lanes];
            for (int i = 0; i < lanes; i += 2) {
                const V a = _mm256_loadu_si256(reinterpret_cast<const V*>(from[i] + at + 32 * half));
                const V b = _mm256_loadu_si256(reinterpret_cast<const V*>(from[i + 1] + at + 32 * half));
                pairs[i] = _mm256_unpacklo_epi32(a, b);
                pairs[i + 1] = _mm256_unpackhi_epi32(a, b);
            }
            for (int i = 0; i < lanes; i += 4) {
                fours[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
                fours[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
                fours[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
                fours[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
            }
            for (int i = 0; i < 4; ++i) {
                message[8 * half + i] =
                    _mm256_shuffle_epi8(_mm256_permute2x128_si256(fours[i], fours[4 + i], 0x20), swap);
                message[8 * half + 4 + i] =
                    _mm256_shuffle_epi8(_mm256_permute2x128_si256(fours[i], fours[4 + i], 0x31), swap);
            }
        }
    }
};

struct Sixteen {
    using V = __m512i;
    static constexpr int lanes = 16;
    PM_LANES V all(std::uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
    PM_LANES V add(V a, V b) { return _mm512_add_epi32(a, b); }
    template <int n>
    PM_LANES V turn(V a) {
        return _mm512_ror_epi32(a, n);
    }
    template <int n>
    PM_LANES V shift(V a) {
        return _mm512_srli_epi32(a, n);
    }
    template <int table>
    PM_LANES V bits(V a, V b, V c) {
        return _mm512_ternarylogic_epi32(a, b, c, table);
    }
    PM_LANES void store(std::uint32_t* to, V a) { _mm512_storeu_si512(to, a); }

    PM_LANES void load(V* message, const std::uint8_t* const* from, std::int64_t at) {
        const V swap = _mm512_broadcast_i32x4(_mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
        V pairs[lanes], fours[lanes];
        for (int i = 0; i < lanes; i += 2) {
            const V a = _mm512_loadu_si512(from[i] + at), b = _mm512_loadu_si512(from[i + 1] + at);
            pairs[i] = _mm512_unpacklo_epi32(a, b);
            pairs[i + 1] = _mm512_unpackhi_epi32(a, b);
        }
        for (int i = 0; i < lanes; i += 4) {
            fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
            fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
            fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
            fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            const V even = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88);
            const V evens = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88);
            const V odd = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xdd);
            const V odds = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xdd);
            message[i] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(even, evens, 0x88), swap);
            message[4 + i] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(odd, odds, 0x88), swap);
            message[8 + i] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(even, evens, 0xdd), swap);
            message[12 + i] = _mm512_shuffle_epi8(_mm512_shuffle_i32x4(odd, odds, 0xdd), swap);
        }
    }
};

constexpr int exclusive_or = 0x96, choice = 0xca, majority = 0xe8;  // of three bits, as tables

template <class L>
PM_LANES void take_block(typename L::V* state, typename L::V* w) {
    using V = typename L::V;
    V a = state[0], b = state[1], c = state[2], d = state[3], e = state[4], f = state[5], g = state[6], h = state[7];
#pragma GCC unroll 64
    for (int i = 0; i < rounds; ++i) {
        V& word = w[i % words];
        if (i >= words) {
            const V before = w[(i + 1) % words], last = w[(i + 14) % words];
            const V low = L::template bits<exclusive_or>(L::template turn<7>(before), L::template turn<18>(before),
                                                         L::template shift<3>(before));
            const V high = L::template bits<exclusive_or>(L::template turn<17>(last), L::template turn<19>(last),
                                                          L::template shift<10>(last));
            word = L::add(L::add(word, low), L::add(w[(i + 9) % words], high));
        }
        const V turned =
            L::template bits<exclusive_or>(L::template turn<6>(e), L::template turn<11>(e), L::template turn<25>(e));
        const V first =
            L::add(L::add(L::add(h, L::all(constants[i])), L::add(word, L::template bits<choice>(e, f, g))), turned);
        const V second = L::add(
            L::template bits<exclusive_or>(L::template turn<2>(a), L::template turn<13>(a), L::template turn<22>(a)),
            L::template bits<majority>(a, b, c));
        h = g, g = f, f = e, e = L::add(d, first), d = c, c = b, b = a, a = L::add(first, second);
    }
    const V found[state_words] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < state_words; ++i) state[i] = L::add(state[i], found[i]);
}

template <class L>
PM_LANES void take_blocks(typename L::V* state, const std::uint8_t* const* from, std::int64_t begin, std::int64_t end) {
    typename L::V message[words];
    for (std::int64_t at = begin; at < end; at += block) {
        L::load(message, from, at);
        take_block<L>(state, message);
    }
}

// What is left of a part of `nbytes` bytes behind its whole blocks, padded: a bit, zeros, and the number of bits.
struct Tail {
    std::uint8_t bytes[2 * block] = {};
    std::int64_t count;

    Tail(const std::uint8_t* part, std::int64_t nbytes) {
        const std::int64_t left = nbytes % block;
        std::copy_n(part + nbytes - left, left, bytes);
        bytes[left] = 0x80;
        count = left + 9 <= block ? block : 2 * block;
        for (int i = 0; i < 8; ++i) bytes[count - 1 - i] = static_cast<std::uint8_t>(nbytes * 8 >> (8 * i));
    }
};

// Ends the parts of some lanes, which all have what is left in common, and writes their digests.
template <class L>
PM_LANES void end_parts(std::uint8_t* digests, const typename L::V* state, const Tail& tail, std::int64_t first,
                        std::int64_t stop) {
    typename L::V own[state_words];
    const std::uint8_t* from[L::lanes];
    std::copy_n(state, state_words, own);
    std::fill_n(from, L::lanes, tail.bytes);
    take_blocks<L>(own, from, 0, tail.count);
    std::uint32_t found[state_words][L::lanes];
    for (int i = 0; i < state_words; ++i) L::store(found[i], own[i]);
    for (std::int64_t lane = first; lane < stop; ++lane) {
        for (int i = 0; i < state_words; ++i) {
            const std::uint32_t word = __builtin_bswap32(found[i][lane]);
            std::memcpy(digests + lane * digest_bytes + 4 * i, &word, sizeof(word));
        }
    }
}

// Hashes all parts of `p`, at least two and at most as many as there are lanes.
template <class L>
__attribute__((target("arch=x86-64-v4"))) void hash_parts(const PartDigestsParams& p) {
    const std::int64_t count = (p.nbytes + p.part - 1) / p.part, last = p.nbytes - (count - 1) * p.part;
    const std::uint8_t* from[L::lanes];
    // Lanes that nobody needs do the first part again.
    for (std::int64_t lane = 0; lane < L::lanes; ++lane) from[lane] = p.data + (lane < count ? lane * p.part : 0);
    typename L::V state[state_words];
    for (int i = 0; i < state_words; ++i) state[i] = L::all(start[i]);
    const std::int64_t common = last / block * block;
    take_blocks<L>(state, from, 0, common);
    end_parts<L>(p.digests, state, {from[count - 1], last}, count - 1, count);
    from[count - 1] = p.data;
    take_blocks<L>(state, from, common, p.part);
    end_parts<L>(p.digests, state, {p.data, p.part}, 0, count - (last < p.part));
}

#pragma GCC diagnostic pop

#endif

}  // namespace

std::int64_t part_digests_cpu(const PartDigestsParams& p) {
    PM_CHECK(p.part > 0 && p.part % 64 == 0, "part_digests: parts of " << p.part << " bytes, no multiple of 64");
    PM_CHECK(p.nbytes >= 0, "part_digests: " << p.nbytes << " bytes");
    std::int64_t done = 0;
#if defined(PM_AVX512)
    while (has_avx512() && p.nbytes - done * p.part > (least_parts - 1) * p.part) {
        const std::int64_t left = p.nbytes - done * p.part;
        const bool few = left <= Eight::lanes * p.part;
        const std::int64_t some = std::min(left, (few ? Eight::lanes : Sixteen::lanes) * p.part);
        const PartDigestsParams part{p.digests + done * digest_bytes, p.data + done * p.part, some, p.part};
        few ? hash_parts<Eight>(part) : hash_parts<Sixteen>(part);
        done += (some + p.part - 1) / p.part;
    }
#endif
    return done;
}

}  // namespace pymerge
