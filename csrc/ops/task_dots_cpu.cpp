#include "ops/task_dots.h"

#include <algorithm>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"

namespace pymerge {
namespace {

constexpr std::int64_t block_size = 512;  // elements of all tensors that are in the cache together
constexpr std::int64_t chunk_size = 64 * block_size;
constexpr std::int64_t lanes = 16;  // partial sums of one product: enough for the adder's latency

template <class A, class T>
PM_TARGET_CLONES void read_values(A* __restrict to, const T* __restrict from, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = load<A>(from[i]);
}

template <class A>
PM_TARGET_CLONES void subtract(A* __restrict values, const A* __restrict origin, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) values[i] -= origin[i];
}

template <class A>
PM_TARGET_CLONES double dot(const A* __restrict left, const A* __restrict right, std::int64_t n) {
    double sums[lanes] = {};
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (std::int64_t k = 0; k < lanes; ++k) {
            sums[k] += static_cast<double>(left[i + k]) * static_cast<double>(right[i + k]);
        }
    }
    for (; i < n; ++i) sums[i % lanes] += static_cast<double>(left[i]) * static_cast<double>(right[i]);
    for (std::int64_t half = lanes / 2; half > 0; half /= 2) {
        for (std::int64_t k = 0; k < half; ++k) sums[k] += sums[k + half];
    }
    return sums[0];
}

// Adds the products of elements begin to end to the lower triangle of `sums` (count x count).
template <class A>
void add_dots(const TaskDotsParams& p, std::int64_t begin, std::int64_t end, std::vector<A>& values, double* sums) {
    A* origin = values.data() + p.count * block_size;
    for (std::int64_t at = begin; at < end; at += block_size) {
        const std::int64_t n = std::min(block_size, end - at);
        const auto read = [&](A* to, const MatrixView& from) {
            dispatch(from.dtype, [&](auto tag) {
                using T = typename decltype(tag)::type;
                read_values<A, T>(to, static_cast<const T*>(from.data) + at, n);
            });
        };
        if (p.base.data != nullptr) read(origin, p.base);
        for (std::int64_t t = 0; t < p.count; ++t) {
            A* task = values.data() + t * block_size;
            read(task, p.inputs[t]);
            if (p.base.data != nullptr) subtract<A>(task, origin, n);
            for (std::int64_t s = 0; s <= t; ++s) {
                sums[t * p.count + s] += dot<A>(task, values.data() + s * block_size, n);
            }
        }
    }
}

template <class A>
void dots_all(const TaskDotsParams& p, int threads) {
    const std::int64_t pairs = p.count * p.count;
    const std::int64_t chunks = chunk_count(p.length, chunk_size);
    std::vector<double> partial(static_cast<std::size_t>(p.vectors * chunks * pairs));
    // One item: a chunk of a long vector, or a few short ones.
    const std::int64_t group = std::max<std::int64_t>(1, chunk_size / std::max<std::int64_t>(1, p.length));
    for_each_item(chunk_count(p.vectors * chunks, group), threads, [&](std::int64_t item) {
        std::vector<A> values(static_cast<std::size_t>((p.count + 1) * block_size));
        for (std::int64_t i = item * group; i < std::min(p.vectors * chunks, (item + 1) * group); ++i) {
            const std::int64_t start = (i / chunks) * p.length + (i % chunks) * chunk_size;
            const std::int64_t end = std::min(start + chunk_size, (i / chunks + 1) * p.length);
            add_dots<A>(p, start, end, values, partial.data() + i * pairs);
        }
    });
    std::fill_n(p.out, p.vectors * pairs, 0.0);
    for (std::int64_t i = 0; i < p.vectors * chunks; ++i) {
        double* out = p.out + (i / chunks) * pairs;
        for (std::int64_t t = 0; t < p.count; ++t) {
            for (std::int64_t s = 0; s <= t; ++s) {
                out[t * p.count + s] += partial[static_cast<std::size_t>(i * pairs + t * p.count + s)];
            }
        }
    }
    for (std::int64_t v = 0; v < p.vectors; ++v) {
        double* out = p.out + v * pairs;
        for (std::int64_t t = 0; t < p.count; ++t) {
            for (std::int64_t s = 0; s < t; ++s) out[s * p.count + t] = out[t * p.count + s];
        }
    }
}

}  // namespace

void task_dots_cpu(const TaskDotsParams& p, int threads) {
    PM_CHECK(p.vectors >= 0 && p.length >= 0 && p.count > 0,
             "task_dots: " << p.count << " tensors of " << p.vectors << " vectors of " << p.length << " elements");
    if (is_double(p.base) || std::any_of(p.inputs, p.inputs + p.count, is_double)) {
        dots_all<double>(p, threads);
    } else {
        dots_all<float>(p, threads);
    }
}

}  // namespace pymerge
