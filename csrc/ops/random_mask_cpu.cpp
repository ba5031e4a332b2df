#include "ops/random_mask.h"

#include "common/check.h"
#include "common/mask_block.h"
#include "common/philox_words.h"
#include "common/ranked_draw.h"
#include "common/sorted_draw.h"

namespace pymerge {
namespace {

constexpr std::int64_t block_size = 2048;
constexpr std::int64_t segment = 16 * block_size;
constexpr std::int64_t word_bits = 32;  // elements of the words that masks are written in: threads never share one

// The numbers of elements begin .. begin + n - 1; room for three more on both sides.
const std::uint32_t* words_of(std::uint32_t* room, std::uint64_t key, std::int64_t begin, std::int64_t n) {
    philox_words(room, key, begin / 4, (begin + n + 3) / 4 - begin / 4);
    return room + begin % 4;
}

PM_TARGET_CLONES void flag_block(std::uint32_t* __restrict flags, const std::uint32_t* __restrict words,
                                 std::uint64_t limit, std::int64_t n) {
    const auto below = static_cast<std::uint32_t>(limit);
    const std::uint32_t all = limit >> 32;  // 1 for probability 1
    for (std::int64_t i = 0; i < n; ++i) flags[i] = (words[i] < below) | all;
}

template <class A>
Norms mask_segment(const RandomMaskParams& p, std::int64_t task, std::int64_t begin) {
    const std::int64_t numel = p.rows * p.columns, end = std::min(numel, begin + segment);
    std::uint8_t* bits = p.out.bits + task * mask_bytes(numel);
    const std::uint64_t limit = random_limit((p.lowest[task] + p.highest[task]) / 2);
    A delta[block_size];
    std::uint32_t room[block_size + 6], flags[block_size];
    Norms norms;
    for (std::int64_t at = begin; at < end; at += block_size) {
        const std::int64_t n = std::min(block_size, end - at);
        task_deltas(delta, p.base, p.experts[task], at, n);
        flag_block(flags, words_of(room, p.keys[task], p.first + at, n), limit, n);
        if (p.out.before != nullptr) norms += block_norms(delta, flags, n);
        std::fill(flags + n, flags + (n + word_bits - 1) / word_bits * word_bits, 0u);
        pack_bits(bits + at / 8, flags, n);
    }
    return norms;
}

// A thread's buffers for rows of so many columns.
template <class A>
struct RowBuffers {
    RowBuffers(const std::uint64_t* limits, std::int64_t columns)
        : draw(limits, columns),
          delta(static_cast<std::size_t>(columns)),
          room(static_cast<std::size_t>(columns) + 6),
          flags(static_cast<std::size_t>(columns) + 2 * word_bits) {}

    std::conditional_t<std::is_same_v<A, float>, RankedDraw, SortedDraw> draw;
    std::vector<A> delta;
    std::vector<std::uint32_t> room;
    std::vector<std::uint32_t> flags;
};

template <class A>
Norms mask_rows(const RandomMaskParams& p, std::int64_t task, std::int64_t row, std::int64_t end,
                const std::vector<std::uint64_t>& limits) {
    const std::int64_t columns = p.columns, numel = p.rows * columns;
    std::uint8_t* bits = p.out.bits + task * mask_bytes(numel) + row * columns / 8;
    RowBuffers<A> buffers(limits.data(), columns);
    std::int64_t waiting = 0;  // flags of rows before that do not fill a word
    Norms norms;
    for (; row < end; ++row) {
        A* delta = buffers.delta.data();
        task_deltas(delta, p.base, p.experts[task], row * columns, columns);
        const std::uint32_t* words = words_of(buffers.room.data(), p.keys[task], p.first + row * columns, columns);
        std::uint32_t* flags = buffers.flags.data() + waiting;
        buffers.draw(flags, delta, words);
        if (p.out.before != nullptr) norms += block_norms(delta, flags, columns);
        waiting += columns;
        const std::int64_t whole = waiting / word_bits * word_bits;
        pack_bits(bits, buffers.flags.data(), whole);
        bits += whole / 8;
        std::copy_n(buffers.flags.data() + whole, waiting - whole, buffers.flags.data());
        waiting -= whole;
    }
    std::fill_n(buffers.flags.data() + waiting, word_bits, 0u);
    pack_bits(bits, buffers.flags.data(), waiting);
    return norms;
}

// p 2^32 by rank.
std::vector<std::uint64_t> limits_of(double lowest, double highest, std::int64_t columns) {
    const double step = (highest - lowest) / static_cast<double>(columns - 1);
    std::vector<std::uint64_t> limits;
    for (std::int64_t rank = 0; rank < columns; ++rank) {
        limits.push_back(random_limit(static_cast<double>(rank) * step + lowest));
    }
    return limits;
}

}  // namespace

void random_mask_cpu(const RandomMaskParams& p, int threads) {
    const std::int64_t numel = p.rows * p.columns;
    PM_CHECK(p.columns < std::int64_t{1} << 30, "random_mask: rows of " << p.columns << " elements; use the reference");
    // Rows in groups that fill words.
    const std::int64_t together = std::max<std::int64_t>(1, word_bits * p.columns);
    const std::int64_t rows = std::max<std::int64_t>(1, segment / together) * word_bits;
    const std::int64_t groups = chunk_count(p.rows, rows), segments = chunk_count(numel, segment);
    std::vector<std::vector<std::uint64_t>> limits;  // empty where there is nothing to rank
    for (std::int64_t t = 0; t < p.count; ++t) {
        const bool ranked = p.lowest[t] != p.highest[t] && p.columns > 1;
        limits.push_back(ranked ? limits_of(p.lowest[t], p.highest[t], p.columns) : std::vector<std::uint64_t>());
    }
    const std::int64_t items = std::max(groups, segments);
    std::vector<Norms> parts(static_cast<std::size_t>(items * p.count));
    // Tasks take turns, so that the base's elements are still in the cache.
    for_each_item(items * p.count, threads, [&](std::int64_t item) {
        const std::int64_t t = item % p.count, place = item / p.count;
        const auto& of_ranks = limits[static_cast<std::size_t>(t)];
        Norms& norms = parts[static_cast<std::size_t>(t * items + place)];
        in_delta_type(p.base, p.experts[t], [&](auto tag) {
            using A = typename decltype(tag)::type;
            if (of_ranks.empty()) {
                if (place < segments) norms = mask_segment<A>(p, t, place * segment);
            } else if (place < groups) {
                norms = mask_rows<A>(p, t, place * rows, std::min(p.rows, (place + 1) * rows), of_ranks);
            }
        });
    });
    if (p.out.before != nullptr) sum_norms(parts, p.count, items, p.out.before, p.out.after);
}

}  // namespace pymerge
