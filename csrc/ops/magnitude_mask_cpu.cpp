#include "ops/magnitude_mask.h"

#include "common/check.h"
#include "common/magnitude_blocks.h"
#include "common/mask_block.h"

namespace pymerge {
namespace {

constexpr std::int64_t block_size = 2048;
constexpr std::int64_t segment = 16 * block_size;

template <class A>
PM_TARGET_CLONES void flag_block(std::uint32_t* __restrict flags, const A* __restrict delta, KeyRange<A> kept,
                                 typename KeyRange<A>::Number n) {
    for (typename KeyRange<A>::Number i = 0; i < n; ++i) flags[i] = kept(delta[i], i);
}

template <class A>
Norms mask_segment(const MagnitudeMaskParams& p, std::int64_t task, std::int64_t begin) {
    using Number = typename KeyRange<A>::Number;
    const std::int64_t end = std::min(p.numel, begin + segment);
    std::uint8_t* bits = p.out.bits + task * mask_bytes(p.numel);
    A delta[block_size];
    std::uint32_t flags[block_size];
    Norms norms;
    for (std::int64_t at = begin; at < end; at += block_size) {
        const std::int64_t n = std::min(block_size, end - at);
        task_deltas(delta, p.base, p.experts[task], at, n);
        flag_block(flags, delta, key_range<A>(p.kept, p.dropped, task, at), static_cast<Number>(n));
        if (p.out.before != nullptr) norms += block_norms(delta, flags, n);
        std::fill(flags + n, flags + (n + 31) / 32 * 32, 0u);
        pack_bits(bits + at / 8, flags, n);
    }
    return norms;
}

}  // namespace

void magnitude_mask_cpu(const MagnitudeMaskParams& p, int threads) {
    const std::int64_t segments = chunk_count(p.numel, segment);
    std::vector<Norms> parts(static_cast<std::size_t>(segments * p.count));
    // Tasks take turns, so that the base's segment is still in the cache.
    for_each_item(segments * p.count, threads, [&](std::int64_t item) {
        const std::int64_t task = item % p.count, place = item / p.count;
        parts[static_cast<std::size_t>(task * segments + place)] =
            in_delta_type(p.base, p.experts[task], [&](auto tag) {
                return mask_segment<typename decltype(tag)::type>(p, task, place * segment);
            });
    });
    if (p.out.before != nullptr) sum_norms(parts, p.count, segments, p.out.before, p.out.after);
}

}  // namespace pymerge
