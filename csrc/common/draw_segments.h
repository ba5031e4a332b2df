// What the leading bits of a random number and the bucket of an element tell of a draw by rank.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "common/avx512.h"

namespace pymerge {

// The numbers between the lowest and the highest limit in segments of 2^shift, and for each one from which rank on all
// its numbers are below the limit, and up to which rank none is.
struct DrawSegments {
    static constexpr int most = 32;

    std::uint32_t lowest = 0, between = 0;
    int shift = 0;
    alignas(64) std::uint32_t all_from[most] = {};
    alignas(64) std::uint32_t none_before[most] = {};

    // Of n limits that ascend, by less than 2^32.
    DrawSegments(const std::uint64_t* limits, std::int64_t n)
        : lowest(static_cast<std::uint32_t>(limits[0])), between(static_cast<std::uint32_t>(limits[n - 1]) - lowest) {
        shift = std::max(static_cast<int>(std::bit_width(between)) - 5, 0);
        for (std::uint64_t segment = 0; segment < most; ++segment) {
            const std::uint64_t first = lowest + (segment << shift), last = first + (std::uint64_t{1} << shift) - 1;
            all_from[segment] = static_cast<std::uint32_t>(std::upper_bound(limits, limits + n, last) - limits);
            none_before[segment] = static_cast<std::uint32_t>(std::upper_bound(limits, limits + n, first) - limits);
        }
    }
};

#if defined(PM_AVX512)

// How many of `count` ascending numbers, a power of two of them, are below each of 16 bounds.
__attribute__((target("arch=x86-64-v4"))) static inline __m512i count_below_bounds(const std::uint32_t* numbers,
                                                                                   std::int64_t count, __m512i bounds) {
    __m512i found = _mm512_setzero_si512();
    const auto add = [&](std::int64_t step, int more) __attribute__((target("arch=x86-64-v4"))) {
        const __m512i number = _mm512_i32gather_epi32(found, numbers + step - 1, 4);
        found = _mm512_mask_add_epi32(found, _mm512_cmplt_epu32_mask(number, bounds), found, _mm512_set1_epi32(more));
    };
    for (std::int64_t step = count / 2; step > 0; step /= 2) add(step, static_cast<int>(step));
    add(1, 1);
    return found;
}

// flags[i] = 1 for the first n / 16 * 16 elements that are kept by their segment and bucket; lists those of which these
// do not tell. `starts` [buckets + 1] are the ranks at which buckets begin.
__attribute__((target("arch=x86-64-v4"))) static inline std::int64_t draw_by_segment_avx512(
    std::uint32_t* __restrict flags, std::uint32_t* __restrict list, const std::uint32_t* __restrict words,
    const std::uint32_t* __restrict buckets, const std::uint32_t* __restrict starts, std::int64_t bucket_count,
    const DrawSegments& segments, std::int64_t n) {
    const __m512i one = _mm512_set1_epi32(1), lanes = _mm512_set1_epi32(16);
    // From which bucket on all are kept, and below which none is.
    __m512i all[2], none[2];
    for (int half = 0; half < 2; ++half) {
        all[half] = count_below_bounds(starts, bucket_count, _mm512_load_si512(segments.all_from + 16 * half));
        none[half] = count_below_bounds(starts + 1, bucket_count,
                                        _mm512_add_epi32(_mm512_load_si512(segments.none_before + 16 * half), one));
    }
    const __m512i lowest = _mm512_set1_epi32(static_cast<int>(segments.lowest));
    const __m512i between = _mm512_set1_epi32(static_cast<int>(segments.between));
    const __m128i shift = _mm_cvtsi32_si128(segments.shift);
    __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    std::int64_t found = 0;
    for (std::int64_t i = 0; i + 16 <= n; i += 16) {
        const __m512i word = _mm512_loadu_si512(words + i), bucket = _mm512_loadu_si512(buckets + i);
        const __m512i above = _mm512_sub_epi32(word, lowest), segment = _mm512_srl_epi32(above, shift);
        const __mmask16 open = _mm512_cmplt_epu32_mask(above, between);
        const __mmask16 all_kept =
            _mm512_mask_cmpge_epu32_mask(open, bucket, _mm512_permutex2var_epi32(all[0], segment, all[1]));
        const __mmask16 some =
            _mm512_mask_cmpge_epu32_mask(open, bucket, _mm512_permutex2var_epi32(none[0], segment, none[1]));
        const __mmask16 kept = _mm512_cmplt_epu32_mask(word, lowest) | all_kept;
        _mm512_storeu_si512(flags + i, _mm512_maskz_mov_epi32(kept, one));
        const __mmask16 unknown = some & static_cast<__mmask16>(~all_kept);
        _mm512_storeu_si512(list + found, _mm512_maskz_compress_epi32(unknown, places));
        found += __builtin_popcount(unknown);
        places = _mm512_add_epi32(places, lanes);
    }
    return found;
}

#endif

}  // namespace pymerge
