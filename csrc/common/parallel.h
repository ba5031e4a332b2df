// Work split into chunks that depend on the problem alone, never on the thread count: the same bits on any machine.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>
#endif

// Inner loops are compiled for several instruction sets and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PM_TARGET_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PM_TARGET_CLONES
#endif

namespace pymerge {

inline std::int64_t chunk_count(std::int64_t total, std::int64_t chunk) { return (total + chunk - 1) / chunk; }

inline int team_of(std::int64_t count, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(count, 1, std::max(threads, 1)));
}

#if !defined(_OPENMP)
// Calls f(item, thread) for 0 .. count - 1, `step` of them at a time on the first thread that is free. Threads start
// and end here: none waits between calls, so that a process may fork. Where fewer can be had, they do it all.
template <class F>
void share_items(std::int64_t count, int team, std::int64_t step, F&& f) {
    std::atomic<std::int64_t> next{0};
    const auto work = [&](int thread) {
        for (std::int64_t begin = next.fetch_add(step); begin < count; begin = next.fetch_add(step)) {
            const std::int64_t end = std::min(count, begin + step);
            for (std::int64_t item = begin; item < end; ++item) f(item, thread);
        }
    };
    std::vector<std::thread> others;
    others.reserve(static_cast<std::size_t>(team - 1));
    try {
        for (int thread = 1; thread < team; ++thread) others.emplace_back(work, thread);
    } catch (const std::system_error&) {
    }
    work(0);
    for (std::thread& other : others) other.join();
}
#endif

// Calls f(item) for 0 .. count - 1; f must not throw. A thread takes at least `least` items: starting one costs more
// than a little work.
template <class F>
void for_each_item(std::int64_t count, int threads, F&& f, std::int64_t least = 1) {
    const int team = team_of(count / least, threads);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(team) schedule(static) if (team > 1)
    for (std::int64_t item = 0; item < count; ++item) f(item);
#else
    share_items(count, team, std::max<std::int64_t>(1, count / (4 * team)), [&](std::int64_t item, int) { f(item); });
#endif
}

// Calls f(item, thread), each item on the first thread that is free, thread < threads; f must not throw.
template <class F>
void for_each_item_when_free(std::int64_t count, int threads, F&& f) {
    const int team = team_of(count, threads);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(team) schedule(dynamic) if (team > 1)
    for (std::int64_t item = 0; item < count; ++item) f(item, omp_get_thread_num());
#else
    share_items(count, team, 1, f);
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
