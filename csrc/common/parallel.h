// Work split into chunks that depend on the problem alone, never on the thread count: the same bits on any machine.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

// Inner loops are compiled for several instruction sets and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PM_TARGET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PM_TARGET_CLONES
#endif

namespace pymerge {

inline std::int64_t chunk_count(std::int64_t total, std::int64_t chunk) { return (total + chunk - 1) / chunk; }

// Calls f(item) for 0 .. count - 1; f must not throw. A thread takes at least `least` items: starting one costs more
// than a little work.
template <class F>
void for_each_item(std::int64_t count, int threads, F&& f, std::int64_t least = 1) {
    const int team = static_cast<int>(std::clamp<std::int64_t>(count / least, 1, std::max(threads, 1)));
#if defined(_OPENMP)
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
#else
    static_cast<void>(team);
#endif
    for (std::int64_t item = 0; item < count; ++item) f(item);
}

// Calls f(item, thread), each item on the first thread that is free, thread < threads; f must not throw.
template <class F>
void for_each_item_when_free(std::int64_t count, int threads, F&& f) {
#if defined(_OPENMP)
    const int team = static_cast<int>(std::clamp<std::int64_t>(count, 1, std::max(threads, 1)));
#pragma omp parallel for num_threads(team) schedule(dynamic) if (team > 1)
    for (std::int64_t item = 0; item < count; ++item) f(item, omp_get_thread_num());
#else
    static_cast<void>(threads);
    for (std::int64_t item = 0; item < count; ++item) f(item, 0);
#endif
}

// Calls f(begin, end) for each chunk of [0, total).
template <class F>
void for_each_chunk(std::int64_t total, std::int64_t chunk, int threads, F&& f) {
    for_each_item(
        chunk_count(total, chunk), threads,
        [&](std::int64_t index) { f(index * chunk, std::min(total, (index + 1) * chunk)); }, 2);
}

}  // namespace pymerge
