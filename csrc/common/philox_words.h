// Many numbers of Philox at once, on CPUs.
#pragma once

#include "common/avx512.h"
#include "common/parallel.h"
#include "common/philox.h"

namespace pymerge {

// The four numbers of each of the counters first .. first + n - 1.
PM_TARGET_CLONES static inline void philox_words_anywhere(std::uint32_t* __restrict to, std::uint64_t key,
                                                          std::int64_t first, std::int64_t n) {
    const auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
    for (std::int64_t i = 0; i < n; ++i) {
        const auto place = static_cast<std::uint64_t>(first + i);
        const PhiloxWords words =
            philox({{static_cast<std::uint32_t>(place), static_cast<std::uint32_t>(place >> 32), 0, 0}}, k0, k1);
        for (int j = 0; j < 4; ++j) to[4 * i + j] = words.x[j];
    }
}

#if defined(PM_AVX512)

// The same, 16 counters a step and n a multiple of that. A word is the lower half of a 64-bit lane, and the upper half
// is whatever a product left there: multiplication does not look at it, so nothing has to be moved between lanes.
__attribute__((target("arch=x86-64-v4"))) static inline void philox_words_avx512(std::uint32_t* __restrict to,
                                                                                 std::uint64_t key, std::int64_t first,
                                                                                 std::int64_t n) {
    constexpr int halves = 2;  // two chains of operations, so that one waits for nothing
    const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53), multiplier1 = _mm512_set1_epi64(0xCD9E8D57);
    const __m512i lower = _mm512_set1_epi64(0xffffffff);
    const __m512i starts = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i firsts = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                  seconds = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    for (std::int64_t i = 0; i < n; i += 8 * halves) {
        __m512i c0[halves], c1[halves], c2[halves], c3[halves];
        for (int h = 0; h < halves; ++h) {
            c0[h] = _mm512_add_epi64(starts, _mm512_set1_epi64(first + i + 8 * h));
            c1[h] = _mm512_srli_epi64(c0[h], 32);
            c2[h] = c3[h] = _mm512_setzero_si512();
        }
        auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
        for (int round = 0; round < philox_rounds; ++round) {
            const __m512i key0 = _mm512_set1_epi64(k0), key1 = _mm512_set1_epi64(k1);
            for (int h = 0; h < halves; ++h) {
                const __m512i product0 = _mm512_mul_epu32(c0[h], multiplier0);
                const __m512i product1 = _mm512_mul_epu32(c2[h], multiplier1);
                c0[h] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(product1, 32), c1[h]), key0);
                c2[h] = _mm512_xor_si512(_mm512_xor_si512(_mm512_srli_epi64(product0, 32), c3[h]), key1);
                c1[h] = product1;
                c3[h] = product0;
            }
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        for (int h = 0; h < halves; ++h) {
            const __m512i low = _mm512_or_si512(_mm512_and_si512(c0[h], lower), _mm512_slli_epi64(c1[h], 32));
            const __m512i high = _mm512_or_si512(_mm512_and_si512(c2[h], lower), _mm512_slli_epi64(c3[h], 32));
            std::uint32_t* place = to + 4 * (i + 8 * h);
            _mm512_storeu_si512(place, _mm512_permutex2var_epi64(low, firsts, high));
            _mm512_storeu_si512(place + 16, _mm512_permutex2var_epi64(low, seconds, high));
        }
    }
}

#endif

// The numbers of elements 4 first .. 4 (first + n) - 1.
inline void philox_words(std::uint32_t* to, std::uint64_t key, std::int64_t first, std::int64_t n) {
    std::int64_t done = 0;
#if defined(PM_AVX512)
    if (has_avx512()) {
        done = n / 16 * 16;
        philox_words_avx512(to, key, first, done);
    }
#endif
    philox_words_anywhere(to + 4 * done, key, first + done, n - done);
}

}  // namespace pymerge
