// Buckets of about equal magnitudes: 2^bits an octave, of the highest octaves of a row.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/avx512.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace pymerge {

// The first bucket is of zeros, the second of all magnitudes below the octaves that have buckets of their own.
struct BucketScale {
    int shift;           // bits of a magnitude that do not matter to its bucket
    std::int32_t below;  // what is left of a magnitude of bucket 0
};

inline std::uint32_t magnitude_bits(float value) { return bit_copy<std::uint32_t>(value) & 0x7fffffffu; }

// buckets[i] of delta[i] for i from `first` on. Lists the elements that need not be the only magnitude of their bucket:
// all but zeros and those of the least magnitude that falls into a bucket. The length of the list.
static inline std::int64_t find_buckets_anywhere(std::uint32_t* __restrict buckets, std::uint32_t* __restrict list,
                                                 const float* __restrict delta, BucketScale scale, std::int64_t first,
                                                 std::int64_t n) {
    std::int64_t found = 0;
    for (std::int64_t i = first; i < n; ++i) {
        const std::uint32_t size = magnitude_bits(delta[i]);
        const std::int32_t bucket = static_cast<std::int32_t>(size >> scale.shift) - scale.below;
        buckets[i] = size == 0 ? 0u : static_cast<std::uint32_t>(std::max(bucket, 1));
        list[found] = static_cast<std::uint32_t>(i);
        found += (size >> scale.shift << scale.shift) != size || (bucket < 1 && size != 0);
    }
    return found;
}

#if defined(PM_AVX512)

// The same, of the first n / 16 * 16.
__attribute__((target("arch=x86-64-v4"))) static inline std::int64_t find_buckets_avx512(
    std::uint32_t* __restrict buckets, std::uint32_t* __restrict list, const float* __restrict delta, BucketScale scale,
    std::int64_t n) {
    const __m512i sizes = _mm512_set1_epi32(0x7fffffff), one = _mm512_set1_epi32(1), lanes = _mm512_set1_epi32(16);
    const __m512i below = _mm512_set1_epi32(scale.below), rest = _mm512_set1_epi32((1 << scale.shift) - 1);
    const __m128i shift = _mm_cvtsi32_si128(scale.shift);
    __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    std::int64_t found = 0;
    for (std::int64_t i = 0; i + 16 <= n; i += 16) {
        const __m512i size = _mm512_and_si512(_mm512_loadu_si512(delta + i), sizes);
        const __m512i bucket = _mm512_sub_epi32(_mm512_srl_epi32(size, shift), below);
        const __mmask16 some = _mm512_test_epi32_mask(size, size);
        _mm512_storeu_si512(buckets + i, _mm512_maskz_max_epi32(some, bucket, one));
        const __mmask16 mixed = _mm512_test_epi32_mask(size, rest) | _mm512_mask_cmplt_epi32_mask(some, bucket, one);
        if (mixed != 0) {
            _mm512_storeu_si512(list + found, _mm512_maskz_compress_epi32(mixed, places));
            found += __builtin_popcount(mixed);
        }
        places = _mm512_add_epi32(places, lanes);
    }
    return found;
}

#endif

// `list` has room for 16 entries more than there are elements.
inline std::int64_t find_buckets(std::uint32_t* buckets, std::uint32_t* list, const float* delta, BucketScale scale,
                                 std::int64_t n) {
    std::int64_t done = 0, found = 0;
#if defined(PM_AVX512)
    if (has_avx512()) {
        done = n / 16 * 16;
        found = find_buckets_avx512(buckets, list, delta, scale, done);
    }
#endif
    return found + find_buckets_anywhere(buckets, list + found, delta, scale, done, n);
}

}  // namespace pymerge
