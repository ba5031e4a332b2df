#include "ops/sparse_combine.h"

#include "common/bitmask.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "ops/sparse_combine_fused.h"

namespace pymerge {
namespace {

// Elements that one pass keeps in the first-level cache: origin, flags, votes, sum and divisor.
constexpr std::int64_t block_size = 1024;
constexpr std::int64_t chunk_size = 16 * block_size;

template <class A, class T>
PM_TARGET_CLONES void read_block(A* __restrict to, const T* __restrict from, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = load<A>(from[i]);
}

// Magnitudes are compared as D's: of a task without float64 in float, whatever type A all is computed in.
template <class D, class A, class T>
PM_TARGET_CLONES void keep_range(A* __restrict kept, const A* __restrict origin, const T* __restrict values,
                                 KeyRange<D> range, typename KeyRange<D>::Number n) {
    for (typename KeyRange<D>::Number i = 0; i < n; ++i) {
        const D delta = task_delta(load<D>(values[i]), static_cast<D>(origin[i]));
        kept[i] = static_cast<A>(static_cast<std::int32_t>(range(delta, i)));
    }
}

template <class A, class T>
PM_TARGET_CLONES void add_block(A* __restrict total, const A* __restrict origin, const T* __restrict values,
                                const A* __restrict kept, A size, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) total[i] += (load<A>(values[i]) - origin[i]) * kept[i] * size;
}

template <class A, class T>
PM_TARGET_CLONES void add_agreeing_block(A* __restrict total, A* __restrict share, const A* __restrict vote,
                                         const A* __restrict origin, const T* __restrict values,
                                         const A* __restrict kept, A size, A weight, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        const A value = (load<A>(values[i]) - origin[i]) * kept[i] * size;
        const A agrees = sparse_agrees<A>(value, vote[i]);
        total[i] += value * agrees;
        share[i] += weight * agrees;
    }
}

template <class A>
PM_TARGET_CLONES void divide_block(A* __restrict total, const A* __restrict share, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) total[i] /= share[i] == A(0) ? A(1) : share[i];
}

template <class A, class T>
PM_TARGET_CLONES void write_block(T* __restrict to, const A* __restrict origin, const A* __restrict total, A scale,
                                  std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Round<T>::from(origin[i] + total[i] * scale);
}

// Calls f(const T* at begin) for the stored type.
template <class F>
void with_values(const MatrixView& m, std::int64_t begin, F&& f) {
    dispatch(m.dtype, [&](auto tag) { f(static_cast<const typename decltype(tag)::type*>(m.data) + begin); });
}

template <class A>
void combine_block(const SparseCombineParams& p, A all, std::int64_t begin, std::int64_t n) {
    A origin[block_size], kept[block_size], vote[block_size], total[block_size], share[block_size];
    with_values(p.base, begin, [&](auto* values) { read_block(origin, values, n); });
    std::fill_n(kept, n, A(1));
    const auto mask = [&](std::int64_t t) {
        if (p.bits != nullptr) {
            unpack_bits<A>(kept, p.bits + t * mask_bytes(p.numel) + begin / 8, n);
        } else if (p.kept.keys != nullptr) {
            in_delta_type(p.base, p.experts[t], [&](auto tag) {
                using D = typename decltype(tag)::type;
                using Number = typename KeyRange<D>::Number;
                const KeyRange<D> range = key_range<D>(p.kept, p.dropped, t, begin);
                with_values(p.experts[t], begin,
                            [&](auto* values) { keep_range<D>(kept, origin, values, range, static_cast<Number>(n)); });
            });
        }
    };
    A* sums = p.elect ? vote : total;
    std::fill_n(sums, n, A(0));
    for (std::int64_t t = 0; t < p.count; ++t) {
        mask(t);
        const A size = static_cast<A>(p.sizes[t]);
        with_values(p.experts[t], begin, [&](auto* values) { add_block(sums, origin, values, kept, size, n); });
    }
    std::fill_n(share, n, p.elect ? A(0) : all);
    if (p.elect) {
        std::fill_n(total, n, A(0));
        for (std::int64_t t = 0; t < p.count; ++t) {
            mask(t);
            const A size = static_cast<A>(p.sizes[t]), weight = static_cast<A>(p.weights[t]);
            with_values(p.experts[t], begin, [&](auto* values) {
                add_agreeing_block(total, share, vote, origin, values, kept, size, weight, n);
            });
        }
    }
    if (p.normalize) divide_block(total, share, n);
    dispatch(p.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        write_block<A, T>(static_cast<T*>(p.out.data) + begin, origin, total, static_cast<A>(p.scale), n);
    });
}

template <class A>
void combine_all(const SparseCombineParams& p, int threads) {
    double all = 0.0;
    for (std::int64_t t = 0; t < p.count; ++t) all += p.weights[t];
    const bool fused = sizeof(A) == sizeof(float) && can_fuse(p);
    for_each_chunk(p.numel, chunk_size, threads, [&](std::int64_t begin, std::int64_t end) {
        if (fused) {
            const std::int64_t whole = (end - begin) / sparse_fused_elements * sparse_fused_elements;
            sparse_fused(p, static_cast<float>(all), begin, whole);
            begin += whole;
        }
        for (std::int64_t at = begin; at < end; at += block_size) {
            combine_block<A>(p, static_cast<A>(all), at, std::min(block_size, end - at));
        }
    });
}

}  // namespace

void sparse_combine_cpu(const SparseCombineParams& p, int threads) {
    bool in_double = p.base.dtype == DType::f64;
    for (std::int64_t t = 0; t < p.count; ++t) in_double |= p.experts[t].dtype == DType::f64;
    if (in_double) {
        combine_all<double>(p, threads);
    } else {
        combine_all<float>(p, threads);
    }
}

}  // namespace pymerge
