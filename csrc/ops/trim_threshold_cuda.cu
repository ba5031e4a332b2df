#include "ops/trim_threshold.h"

#include <algorithm>

#include "common/quads.h"

// Two digits of 16 bits, and one pass over the weights for each; no step waits for the host.
//   high: the upper 15 bits of a key, and whether the lower 16 are not all 0. Of a delta that is a bfloat16 they are,
//         so that among bfloat16 weights one digit settles nearly every selection.
//   low:  the lower 16 bits, of the keys whose high digit is the one that was found; only where those are not 0.
// Counts are integers, added in any order: the result does not depend on how the work is divided.

namespace pymerge {
namespace {

constexpr int threads = 512;
constexpr int quads = 4;                            // of a thread, loaded together
constexpr std::int64_t step = threads * quads * 4;  // elements that a block takes at once
constexpr std::int64_t least_part = 4 * step;       // of a block: fewer, and it would be busy with its table
constexpr std::int64_t blocks_at_most = 1024;
constexpr std::int64_t tasks_at_most = 128;  // kernel arguments hold 4 KiB
constexpr int bins = 1 << 16;
// High digits that a block counts in shared memory: magnitudes from 2^-31 to 2. Others go to the table in memory.
constexpr std::uint32_t window_first = 96 << 8;
constexpr std::uint32_t window_bins = 32 << 8;

struct Input {
    const void* data;
    DType dtype;
};

// What is known of a selection.
struct Search {
    std::int64_t left;   // elements to be taken among those that are like the key as far as it is known
    std::int64_t equal;  // how many those are
    std::uint32_t key;
    std::uint32_t open;  // the low digit is not known
};

struct Arguments {
    std::int64_t* keys;
    std::int64_t* ends;
    std::uint32_t* tables;  // tasks x bins
    Search* searches;       // tasks
    std::uint32_t* ties;    // tasks x parts
    std::int64_t numel;
    std::int64_t part;  // elements
    Input base;
    std::int64_t counts[tasks_at_most];
    Input experts[tasks_at_most];

    PM_HOST_DEVICE std::int64_t parts() const { return (numel + part - 1) / part; }
};
static_assert(sizeof(Arguments) <= 4096);

// A task is a column of the grid: blocks of the same part run together and find the base in L2.
__device__ __forceinline__ unsigned task_of_block() { return blockIdx.x; }

__device__ __forceinline__ std::uint32_t high_digit(std::uint32_t key) {
    return (key >> 16) * 2 + ((key & 0xffffu) != 0 ? 1u : 0u);
}

__device__ __forceinline__ Quad load_quad_of(const Input& input, std::int64_t begin, int valid) {
    const unsigned bytes = input.dtype == DType::f32 ? 16 : 8;
    const bool vector = valid == 4 && reinterpret_cast<std::uintptr_t>(input.data) % bytes == 0;
    return load_quad(input.data, input.dtype, begin, valid, vector);
}

// Calls f(key, index) for the elements of [begin, end) that this thread takes, a quad `stride` elements after the
// other; begin is a multiple of 4.
template <class F>
__device__ __forceinline__ void for_each_key(const Arguments& a, std::int64_t begin, std::int64_t end,
                                             std::int64_t stride, F&& f) {
    const Input &base = a.base, &expert = a.experts[task_of_block()];
    for (std::int64_t at = begin; at < end; at += quads * stride) {
        Quad origin[quads], values[quads];
        int valid[quads];
#pragma unroll
        for (int q = 0; q < quads; ++q) {
            const std::int64_t here = at + q * stride, rest = end - here;
            valid[q] = static_cast<int>(rest < 0 ? 0 : rest < 4 ? rest : 4);
            origin[q] = load_quad_of(base, here, valid[q]);
            values[q] = load_quad_of(expert, here, valid[q]);
        }
#pragma unroll
        for (int q = 0; q < quads; ++q) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (e >= valid[q]) break;
                const float value = element(values[q], expert.dtype, e);
                const float delta = task_delta(value, element(origin[q], base.dtype, e));
                f(magnitude_key(delta), at + q * stride + e);
            }
        }
    }
}

// The same for the part of this block, whose threads take neighbouring quads.
template <class F>
__device__ __forceinline__ void for_each_key_of_part(const Arguments& a, F&& f) {
    const std::int64_t begin = blockIdx.y * a.part;
    const std::int64_t end = begin + a.part < a.numel ? begin + a.part : a.numel;
    for_each_key(a, begin + 4 * threadIdx.x, end, 4 * threads, f);
}

// Sum of the values of the threads before this one.
__device__ std::int64_t sum_before(std::int64_t value) {
    __shared__ std::int64_t sums[threads];
    const int place = static_cast<int>(threadIdx.x);
    sums[place] = value;
    __syncthreads();
    for (int distance = 1; distance < threads; distance *= 2) {
        const std::int64_t other = place >= distance ? sums[place - distance] : 0;
        __syncthreads();
        sums[place] += other;
        __syncthreads();
    }
    return sums[place] - value;
}

__global__ void __launch_bounds__(threads) count_high(const __grid_constant__ Arguments a) {
    __shared__ std::uint32_t window[window_bins];
    __shared__ std::uint32_t zeros;
    for (std::uint32_t bin = threadIdx.x; bin < window_bins; bin += threads) window[bin] = 0;
    if (threadIdx.x == 0) zeros = 0;
    __syncthreads();
    std::uint32_t* table = a.tables + static_cast<std::int64_t>(task_of_block()) * bins;
    std::uint32_t mine = 0;  // weights that were not trained: they would all wait for one bin
    for_each_key_of_part(a, [&](std::uint32_t key, std::int64_t) {
        const std::uint32_t digit = high_digit(key), place = digit - window_first;
        if (digit == 0) {
            ++mine;
        } else if (place < window_bins) {
            atomicAdd(&window[place], 1u);
        } else {
            atomicAdd(&table[digit], 1u);
        }
    });
    if (mine != 0) atomicAdd(&zeros, mine);
    __syncthreads();
    for (std::uint32_t bin = threadIdx.x; bin < window_bins; bin += threads) {
        if (window[bin] != 0) atomicAdd(&table[window_first + bin], window[bin]);
    }
    if (threadIdx.x == 0 && zeros != 0) atomicAdd(&table[0], zeros);
}

__global__ void __launch_bounds__(threads) count_low(const __grid_constant__ Arguments a) {
    const Search search = a.searches[task_of_block()];
    if (search.open == 0) return;
    std::uint32_t* table = a.tables + static_cast<std::int64_t>(task_of_block()) * bins;
    const std::uint32_t digit = high_digit(search.key | 1u);
    for_each_key_of_part(a, [&](std::uint32_t key, std::int64_t) {
        if (high_digit(key) == digit) atomicAdd(&table[key & 0xffffu], 1u);
    });
}

// Where the left-th largest element of a table is, from the top; the thread that finds it calls f(bin, left, equal).
template <class F>
__device__ __forceinline__ void find_bin(const std::uint32_t* table, std::int64_t left, F&& f) {
    constexpr int share = bins / threads;
    const std::uint32_t first = (threads - 1 - threadIdx.x) * share;  // the first thread has the largest
    std::int64_t sum = 0;
    for (int i = 0; i < share; ++i) sum += table[first + i];
    std::int64_t rest = left - sum_before(sum);
    if (rest <= 0 || rest > sum) return;
    std::uint32_t bin = first + share - 1;
    for (; table[bin] < rest; --bin) rest -= table[bin];
    f(bin, rest, static_cast<std::int64_t>(table[bin]));
}

__global__ void __launch_bounds__(threads) settle_high(const __grid_constant__ Arguments a) {
    __shared__ std::uint32_t open;
    std::uint32_t* table = a.tables + static_cast<std::int64_t>(task_of_block()) * bins;
    find_bin(table, a.counts[task_of_block()], [&](std::uint32_t bin, std::int64_t left, std::int64_t equal) {
        a.searches[task_of_block()] = {left, equal, bin / 2 << 16, bin % 2};
        open = bin % 2;
    });
    __syncthreads();
    if (open == 0) return;
    for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += threads) table[bin] = 0;
}

__global__ void __launch_bounds__(threads) settle_low(const __grid_constant__ Arguments a) {
    const Search search = a.searches[task_of_block()];
    if (search.open == 0) return;
    const std::uint32_t* table = a.tables + static_cast<std::int64_t>(task_of_block()) * bins;
    find_bin(table, search.left, [&](std::uint32_t bin, std::int64_t left, std::int64_t equal) {
        a.searches[task_of_block()] = {left, equal, search.key | bin, 0};
    });
}

__global__ void __launch_bounds__(threads) count_ties(const __grid_constant__ Arguments a) {
    const Search search = a.searches[task_of_block()];
    if (search.left == search.equal) return;
    __shared__ std::uint32_t found;
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    std::uint32_t mine = 0;
    for_each_key_of_part(a, [&](std::uint32_t key, std::int64_t) { mine += key == search.key ? 1u : 0u; });
    if (mine != 0) atomicAdd(&found, mine);
    __syncthreads();
    if (threadIdx.x == 0) a.ties[static_cast<std::int64_t>(task_of_block()) * a.parts() + blockIdx.y] = found;
}

// Keys, and the index behind the last element that is taken: first its part, then the thread's share of it.
__global__ void __launch_bounds__(threads) find_end(const __grid_constant__ Arguments a) {
    const unsigned task = task_of_block();
    const Search search = a.searches[task];
    if (threadIdx.x == 0) {
        a.keys[task] = search.key;
        if (search.left == search.equal) a.ends[task] = a.numel;
    }
    if (search.left == search.equal) return;

    __shared__ std::int64_t begin, left;
    const std::uint32_t* ties = a.ties + task * a.parts();
    const std::int64_t share = (a.parts() + threads - 1) / threads;
    const std::int64_t first = threadIdx.x * share;
    const std::int64_t last = first + share < a.parts() ? first + share : a.parts();
    std::int64_t sum = 0;
    for (std::int64_t part = first; part < last; ++part) sum += ties[part];
    std::int64_t rest = search.left - sum_before(sum);
    if (rest > 0 && rest <= sum) {
        std::int64_t part = first;
        for (; ties[part] < rest; ++part) rest -= ties[part];
        begin = part * a.part;
        left = rest;
    }
    __syncthreads();

    const std::int64_t width = a.part / threads;  // whole quads, since parts are whole steps
    const std::int64_t mine = begin + threadIdx.x * width;
    const std::int64_t end = mine + width < a.numel ? mine + width : a.numel;
    sum = 0;
    for_each_key(a, mine, end, 4, [&](std::uint32_t key, std::int64_t) { sum += key == search.key ? 1 : 0; });
    rest = left - sum_before(sum);
    if (rest <= 0 || rest > sum) return;
    for_each_key(a, mine, end, 4, [&](std::uint32_t key, std::int64_t index) {
        if (key == search.key && --rest == 0) a.ends[task] = index + 1;
    });
}

// Elements of a block.
std::int64_t part_of(std::int64_t count, std::int64_t numel) {
    const std::int64_t most = std::max<std::int64_t>(1, blocks_at_most / std::max<std::int64_t>(1, count));
    const std::int64_t part = std::max(least_part, (numel + most - 1) / most);
    return (part + step - 1) / step * step;
}

}  // namespace

std::int64_t trim_threshold_scratch(std::int64_t count, std::int64_t numel) {
    const std::int64_t part = part_of(count, numel), parts = (numel + part - 1) / part;
    return count * (bins * std::int64_t{sizeof(std::uint32_t)} + std::int64_t{sizeof(Search)} +
                    parts * std::int64_t{sizeof(std::uint32_t)});
}

void trim_threshold_cuda(const TrimThresholdParams& p, void* scratch, void* stream) {
    PM_CHECK(p.count <= tasks_at_most, "trim_threshold: " << p.count << " task vectors; one launch takes "
                                                          << tasks_at_most << ", use --backend reference");
    PM_CHECK(p.numel < std::int64_t{1} << 32,
             "trim_threshold: " << p.numel << " elements; counters hold less than 2^32, use --backend reference");
    if (p.count == 0) return;
    auto* tables = static_cast<std::uint32_t*>(scratch);
    auto* searches = reinterpret_cast<Search*>(tables + p.count * bins);
    auto* ties = reinterpret_cast<std::uint32_t*>(searches + p.count);
    Arguments a{p.keys, p.ends, tables, searches, ties, p.numel, part_of(p.count, p.numel), {p.base.data, p.base.dtype},
                {},     {}};
    PM_CHECK(p.base.dtype != DType::f64, "trim_threshold: the base is float64; use the reference");
    for (std::int64_t t = 0; t < p.count; ++t) {
        PM_CHECK(0 < p.counts[t] && p.counts[t] < p.numel,
                 "trim_threshold: count " << p.counts[t] << " of " << p.numel << " elements");
        PM_CHECK(p.experts[t].dtype != DType::f64, "trim_threshold: expert " << t << " is float64; use the reference");
        a.counts[t] = p.counts[t];
        a.experts[t] = {p.experts[t].data, p.experts[t].dtype};
    }
    const dim3 tasks(static_cast<unsigned>(p.count)), all(tasks.x, static_cast<unsigned>(a.parts()));
    const auto on = static_cast<cudaStream_t>(stream);
    count_high<<<all, threads, 0, on>>>(a);
    settle_high<<<tasks, threads, 0, on>>>(a);
    count_low<<<all, threads, 0, on>>>(a);
    settle_low<<<tasks, threads, 0, on>>>(a);
    count_ties<<<all, threads, 0, on>>>(a);
    find_end<<<tasks, threads, 0, on>>>(a);
    PM_CUDA_CHECK(cudaGetLastError());
}

}  // namespace pymerge
