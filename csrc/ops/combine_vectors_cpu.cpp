#include "ops/combine_vectors.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/task_delta.h"

namespace pymerge {
namespace {

constexpr std::int64_t block_size = 1024;  // elements of a row: origin, factors and sum stay in the first-level cache
constexpr std::int64_t chunk_size = 16 * block_size;

template <class A, class T>
PM_TARGET_CLONES void read_block(A* __restrict to, const T* __restrict from, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = load<A>(from[i]);
}

template <class A>
PM_TARGET_CLONES void read_factors(A* __restrict to, const double* __restrict from, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<A>(from[i]);
}

template <class A, class T>
PM_TARGET_CLONES void add_block(A* __restrict total, const A* __restrict origin, const T* __restrict values,
                                const A* __restrict factors, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) total[i] += (load<A>(values[i]) - origin[i]) * factors[i];
}

template <class A, class T>
PM_TARGET_CLONES void write_block(T* __restrict to, const A* __restrict from, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Round<T>::from(from[i]);
}

// Elements of a row from `column` on.
template <class A>
void combine_block(const CombineVectorsParams& p, std::int64_t row, std::int64_t column, std::int64_t n) {
    A origin[block_size] = {}, total[block_size], factors[block_size];
    const std::int64_t at = row * p.columns + column;
    if (p.base.data != nullptr) with_row(p.base, 0, at, [&](auto* from) { read_block(origin, from, n); });
    std::copy_n(origin, n, total);
    for (std::int64_t t = 0; t < p.count; ++t) {
        if (p.by_columns) {
            read_factors(factors, p.weights + t * p.columns + column, n);
        } else {
            std::fill_n(factors, n, static_cast<A>(p.weights[t * p.rows + row]));
        }
        with_row(p.inputs[t], 0, at, [&](auto* values) { add_block(total, origin, values, factors, n); });
    }
    dispatch(p.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        write_block(static_cast<T*>(p.out.data) + at, total, n);
    });
}

template <class A>
void combine_all(const CombineVectorsParams& p, int threads) {
    const std::int64_t together = std::max<std::int64_t>(1, chunk_size / std::max<std::int64_t>(1, p.columns));
    for_each_chunk(p.rows, together, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            for (std::int64_t column = 0; column < p.columns; column += block_size) {
                combine_block<A>(p, row, column, std::min(block_size, p.columns - column));
            }
        }
    });
}

}  // namespace

void combine_vectors_cpu(const CombineVectorsParams& p, int threads) {
    PM_CHECK(p.rows >= 0 && p.columns >= 0 && p.count > 0,
             "combine_vectors: " << p.count << " tensors of " << p.rows << " x " << p.columns << " elements");
    if (is_double(p.base) || std::any_of(p.inputs, p.inputs + p.count, is_double)) {
        combine_all<double>(p, threads);
    } else {
        combine_all<float>(p, threads);
    }
}

}  // namespace pymerge
