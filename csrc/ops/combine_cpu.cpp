#include "ops/combine.h"

#include "common/dispatch.h"
#include "common/parallel.h"
#include "ops/combine_fused.h"

namespace pymerge {
namespace {

// Elements that one pass keeps in the first-level cache: origin and total, 8 KiB each in double.
constexpr std::int64_t block_size = 1024;
constexpr std::int64_t chunk_size = 16 * block_size;

template <class A, class T>
PM_TARGET_CLONES void read_block(A* __restrict to, const T* __restrict from, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = load<A>(from[i]);
}

template <class A, class T>
PM_TARGET_CLONES void add_block(A* __restrict total, const A* __restrict origin, const T* __restrict values, A weight,
                                std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        total[i] = combine_step<A>(total[i], load<A>(values[i]), origin[i], weight);
    }
}

template <class A>
PM_TARGET_CLONES void divide_block(A* __restrict total, A divisor, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) total[i] /= divisor;
}

template <class A, class T>
PM_TARGET_CLONES void write_block(T* __restrict to, const A* __restrict total, const A* __restrict origin,
                                  std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Round<T>::from(origin[i] + total[i]);
}

template <class A>
void combine_block(const CombineParams& p, std::int64_t begin, std::int64_t n) {
    A origin[block_size];
    A total[block_size];
    if (p.base.data == nullptr) {
        std::fill_n(origin, n, A(0));
    } else {
        dispatch(p.base.dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            read_block<A, T>(origin, static_cast<const T*>(p.base.data) + begin, n);
        });
    }
    // Without inputs the base is converted as it is: -0 + -0 is -0, and -0 + 0 is 0.
    std::fill_n(total, n, p.count == 0 ? A(-0.0) : A(0));
    for (std::int64_t t = 0; t < p.count; ++t) {
        dispatch(p.inputs[t].dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            const T* values = static_cast<const T*>(p.inputs[t].data) + begin;
            add_block<A, T>(total, origin, values, static_cast<A>(p.weights[t]), n);
        });
    }
    if (p.divisor != 1.0) divide_block<A>(total, static_cast<A>(p.divisor), n);
    dispatch(p.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        write_block<A, T>(static_cast<T*>(p.out.data) + begin, total, origin, n);
    });
}

template <class A>
void combine_all(const CombineParams& p, int threads) {
    for_each_chunk(p.numel, chunk_size, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t at = begin; at < end; at += block_size) {
            combine_block<A>(p, at, std::min(block_size, end - at));
        }
    });
}

}  // namespace

void combine_cpu(const CombineParams& p, int threads) {
    PM_CHECK(p.numel >= 0, "combine: " << p.numel << " elements");
    if (can_fuse(p)) {
        for_each_chunk(p.numel, chunk_size, threads,
                       [&](std::int64_t begin, std::int64_t end) { combine_fused(p, begin, end - begin); });
    } else if (combine_in_double(p)) {
        combine_all<double>(p, threads);
    } else {
        combine_all<float>(p, threads);
    }
}

}  // namespace pymerge
