// The numbers of a row that lie between two limits.
#pragma once

#include "common/avx512.h"
#include "common/parallel.h"

namespace pymerge {

constexpr std::int64_t list_room = 16;  // of entries behind the last one, which may be written to

// flags[i] = words[i] < below; lists where below <= words[i] < below + between. The length of the list.
static inline std::int64_t list_between_anywhere(std::uint32_t* __restrict flags, std::uint32_t* __restrict list,
                                                 const std::uint32_t* __restrict words, std::uint32_t below,
                                                 std::uint32_t between, std::int64_t first, std::int64_t n) {
    std::int64_t found = 0;
    for (std::int64_t i = first; i < n; ++i) {
        flags[i] = words[i] < below;
        list[found] = static_cast<std::uint32_t>(i);
        found += words[i] - below < between;
    }
    return found;
}

#if defined(PM_AVX512)

// The same, of the first n / 16 * 16.
__attribute__((target("arch=x86-64-v4"))) static inline std::int64_t list_between_avx512(
    std::uint32_t* __restrict flags, std::uint32_t* __restrict list, const std::uint32_t* __restrict words,
    std::uint32_t below, std::uint32_t between, std::int64_t n) {
    const __m512i lowest = _mm512_set1_epi32(static_cast<int>(below));
    const __m512i range = _mm512_set1_epi32(static_cast<int>(between));
    const __m512i one = _mm512_set1_epi32(1), lanes = _mm512_set1_epi32(16);
    __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    std::int64_t found = 0;
    for (std::int64_t i = 0; i + 16 <= n; i += 16) {
        const __m512i word = _mm512_loadu_si512(words + i);
        _mm512_storeu_si512(flags + i, _mm512_maskz_mov_epi32(_mm512_cmplt_epu32_mask(word, lowest), one));
        const __mmask16 open = _mm512_cmplt_epu32_mask(_mm512_sub_epi32(word, lowest), range);
        _mm512_storeu_si512(list + found, _mm512_maskz_compress_epi32(open, places));
        found += __builtin_popcount(open);
        places = _mm512_add_epi32(places, lanes);
    }
    return found;
}

#endif

inline std::int64_t list_between(std::uint32_t* flags, std::uint32_t* list, const std::uint32_t* words,
                                 std::uint32_t below, std::uint32_t between, std::int64_t n) {
    std::int64_t done = 0, found = 0;
#if defined(PM_AVX512)
    if (has_avx512()) {
        done = n / 16 * 16;
        found = list_between_avx512(flags, list, words, below, between, done);
    }
#endif
    return found + list_between_anywhere(flags, list + found, words, below, between, done, n);
}

}  // namespace pymerge
