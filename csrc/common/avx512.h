// Whether loops can be written by hand for AVX-512, where the compiler finds no fast form.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PM_AVX512 1
#include <immintrin.h>

namespace pymerge {

inline bool has_avx512() {
    static const bool has = __builtin_cpu_supports("x86-64-v4");
    return has;
}

}  // namespace pymerge
#endif
