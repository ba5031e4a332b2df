// Fewer page faults where much memory is written for the first time.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pymerge {

// Asks for huge pages in `bytes` bytes from `start` on that are about to be written. Where the system gives none, pages
// are of the usual size: nothing to check.
inline void ask_for_huge_pages(void* start, std::int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr std::int64_t least = std::int64_t{4} << 20;
    constexpr std::uintptr_t page = 4096;
    if (bytes < least) return;
    const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(start);
    const std::uintptr_t first = (begin + page - 1) / page * page;
    const std::uintptr_t last = (begin + static_cast<std::uintptr_t>(bytes)) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    static_cast<void>(start);
    static_cast<void>(bytes);
#endif
}

}  // namespace pymerge
