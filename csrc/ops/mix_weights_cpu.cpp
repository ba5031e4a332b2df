#include "ops/mix_weights.h"

#include <array>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/task_tiles.h"

namespace pymerge {
namespace {

// Sums that stay in registers side by side.
constexpr std::int64_t lanes = 64;
// Elements a thread takes at a time; with T task vectors, that many reads of this length.
constexpr std::int64_t chunk_size = 8192;

template <class W, class E>
PM_TARGET_CLONES void mix_block(float* __restrict out, const W* __restrict base, const E* tasks, std::int64_t stride,
                                const float* __restrict gates, std::int64_t count, std::int64_t n) {
    std::int64_t at = 0;
    for (; at + lanes <= n; at += lanes) {
        float total[lanes];
        for (std::int64_t i = 0; i < lanes; ++i) total[i] = load<float>(base[at + i]);
        for (std::int64_t t = 0; t < count; ++t) {
            const E* tau = tasks + t * stride + at;
            for (std::int64_t i = 0; i < lanes; ++i) total[i] = mix_step(total[i], gates[t], load<float>(tau[i]));
        }
        for (std::int64_t i = 0; i < lanes; ++i) out[at + i] = total[i];
    }
    for (; at < n; ++at) {
        float total = load<float>(base[at]);
        for (std::int64_t t = 0; t < count; ++t) total = mix_step(total, gates[t], load<float>(tasks[t * stride + at]));
        out[at] = total;
    }
}

// The same for K samples at once: what is read of the task vectors is used K times.
template <int K, class W, class E>
PM_TARGET_CLONES void mix_block_of(float* __restrict out, std::int64_t out_stride, const W* __restrict base,
                                   const E* tasks, std::int64_t stride, const float* __restrict gates,
                                   std::int64_t count, std::int64_t n) {
    constexpr std::int64_t width = 32;
    std::int64_t at = 0;
    for (; at + width <= n; at += width) {
        float total[K][width];
        for (int k = 0; k < K; ++k) {
            for (std::int64_t i = 0; i < width; ++i) total[k][i] = load<float>(base[at + i]);
        }
        for (std::int64_t t = 0; t < count; ++t) {
            const E* tau = tasks + t * stride + at;
            float value[width];
            for (std::int64_t i = 0; i < width; ++i) value[i] = load<float>(tau[i]);
            for (int k = 0; k < K; ++k) {
                const float gate = gates[k * count + t];
                for (std::int64_t i = 0; i < width; ++i) total[k][i] = mix_step(total[k][i], gate, value[i]);
            }
        }
        for (int k = 0; k < K; ++k) {
            for (std::int64_t i = 0; i < width; ++i) out[k * out_stride + at + i] = total[k][i];
        }
    }
    for (int k = 0; k < K && at < n; ++k) {
        mix_block(out + k * out_stride + at, base + at, tasks + at, stride, gates + k * count, count, n - at);
    }
}

// Samples that mix_block_of takes at a time: their sums stay in registers.
constexpr std::int64_t together = 4;

// K sparse rows at once, interleaved: sums[c * K + k].
template <int K, class T, class C>
PM_TARGET_CLONES void scatter_row(float* __restrict sums, const T* values, const C* columns, std::int64_t begin,
                                  std::int64_t end, const float* __restrict gates) {
    for (std::int64_t i = begin; i < end; ++i) {
        const float value = load<float>(values[i]);
        float* __restrict at = sums + static_cast<std::int64_t>(columns[i]) * K;
        for (int k = 0; k < K; ++k) at[k] += gates[k] * value;
    }
}

template <class T>
PM_TARGET_CLONES void write_row(T* __restrict to, const float* __restrict from, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Round<T>::from(from[i]);
}

void store(const MixParams& p, std::int64_t begin, const float* values, std::int64_t n) {
    dispatch(p.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        write_row(static_cast<T*>(p.out.data) + begin, values, n);
    });
}

template <class E>
PM_TARGET_CLONES void dot_block(double* __restrict out, const float* __restrict delta, const E* tasks,
                                std::int64_t stride, std::int64_t count, std::int64_t n) {
    for (std::int64_t t = 0; t < count; ++t) {
        const E* __restrict tau = tasks + t * stride;
        float sums[lanes] = {};  // added in this order on every machine
        std::int64_t at = 0;
        for (; at + lanes <= n; at += lanes) {
            for (std::int64_t i = 0; i < lanes; ++i) {
                sums[i] = std::fma(delta[at + i], load<float>(tau[at + i]), sums[i]);
            }
        }
        double total = 0.0;
        for (float sum : sums) total += sum;
        for (; at < n; ++at) total += static_cast<double>(delta[at]) * load<double>(tau[at]);
        out[t] = total;
    }
}

// Adds partial[item][t] over the items, in their order.
void add_up(double* out, const std::vector<double>& partial, std::int64_t items, std::int64_t count) {
    std::fill_n(out, count, 0.0);
    for (std::int64_t item = 0; item < items; ++item) {
        for (std::int64_t t = 0; t < count; ++t) out[t] += partial[static_cast<std::size_t>(item * count + t)];
    }
}

void check_mix(const MixParams& p, std::int64_t count) {
    PM_CHECK(p.rows >= 0 && p.columns >= 0, "mix_weights: " << p.rows << " x " << p.columns << " elements");
    PM_CHECK(count >= 0, "mix_weights: " << count << " tasks");
    PM_CHECK(p.out.dtype != DType::f64, "mix_weights: results are float32, float16 or bfloat16, not float64");
}

}  // namespace

void mix_dense_cpu(const MixParams& p, const DenseTasks& tasks, int threads) {
    check_mix(p, tasks.count);
    for_each_chunk(p.rows * p.columns, chunk_size, threads, [&](std::int64_t begin, std::int64_t end) {
        dispatch(p.base.dtype, [&](auto base_tag) {
            dispatch(tasks.dtype, [&](auto task_tag) {
                using W = typename decltype(base_tag)::type;
                using E = typename decltype(task_tag)::type;
                const W* base = static_cast<const W*>(p.base.data) + begin;
                const E* values = static_cast<const E*>(tasks.data) + begin;
                const std::int64_t numel = p.rows * p.columns;
                std::int64_t sample = 0;
                // Chunk by chunk for all samples: the second one finds the task vectors in the cache.
                for (; p.out.dtype == DType::f32 && sample + together <= p.samples; sample += together) {
                    mix_block_of<together>(static_cast<float*>(p.out.data) + sample * numel + begin, numel, base,
                                           values, tasks.stride, p.gates + sample * tasks.count, tasks.count,
                                           end - begin);
                }
                for (; sample < p.samples; ++sample) {
                    const float* gates = p.gates + sample * tasks.count;
                    if (p.out.dtype == DType::f32) {
                        float* out = static_cast<float*>(p.out.data) + sample * numel + begin;
                        mix_block(out, base, values, tasks.stride, gates, tasks.count, end - begin);
                        continue;
                    }
                    float mixed[chunk_size];
                    mix_block(mixed, base, values, tasks.stride, gates, tasks.count, end - begin);
                    store(p, sample * numel + begin, mixed, end - begin);
                }
            });
        });
    });
}

namespace {

// Rows begin to end of K samples, from the first of them on.
template <int K>
void mix_sparse_rows(const MixParams& p, const SparseTasks& tasks, std::int64_t sample, std::int64_t begin,
                     std::int64_t end) {
    // A whole row of all samples: its scattered sums must not leave the cache between tasks.
    std::vector<float> sums(static_cast<std::size_t>(p.columns * K));
    std::vector<float> row_of_one(static_cast<std::size_t>(p.columns));
    std::vector<float> gates(static_cast<std::size_t>(tasks.count * K));  // T x K
    for (std::int64_t t = 0; t < tasks.count; ++t) {
        for (int k = 0; k < K; ++k) {
            gates[static_cast<std::size_t>(t * K + k)] = p.gates[(sample + k) * tasks.count + t];
        }
    }
    for (std::int64_t row = begin; row < end; ++row) {
        dispatch(p.base.dtype, [&](auto tag) {
            using W = typename decltype(tag)::type;
            read_row(row_of_one.data(), static_cast<const W*>(p.base.data) + row * p.columns, p.columns);
        });
        for (std::int64_t c = 0; c < p.columns; ++c) {
            const float origin = row_of_one[static_cast<std::size_t>(c)];
            for (int k = 0; k < K; ++k) sums[static_cast<std::size_t>(c * K + k)] = origin;
        }
        with_sparse(tasks, [&](auto* values, auto* columns) {
            for (std::int64_t t = 0; t < tasks.count; ++t) {
                const std::int64_t* starts = tasks.starts + t * tasks.start_stride + row;
                scatter_row<K>(sums.data(), values, columns, starts[0], starts[1], gates.data() + t * K);
            }
        });
        for (int k = 0; k < K; ++k) {
            for (std::int64_t c = 0; c < p.columns; ++c) {
                row_of_one[static_cast<std::size_t>(c)] = sums[static_cast<std::size_t>(c * K + k)];
            }
            store(p, ((sample + k) * p.rows + row) * p.columns, row_of_one.data(), p.columns);
        }
    }
}

}  // namespace

void mix_sparse_cpu(const MixParams& p, const SparseTasks& tasks, int threads) {
    check_mix(p, tasks.count);
    const std::int64_t rows_per_chunk = std::max<std::int64_t>(1, chunk_size / std::max<std::int64_t>(1, p.columns));
    for_each_chunk(p.rows, rows_per_chunk, threads, [&](std::int64_t begin, std::int64_t end) {
        std::int64_t sample = 0;
        for (; sample + 8 <= p.samples; sample += 8) mix_sparse_rows<8>(p, tasks, sample, begin, end);
        for (; sample < p.samples; ++sample) mix_sparse_rows<1>(p, tasks, sample, begin, end);
    });
}

void dots_dense_cpu(double* out, const float* delta, std::int64_t numel, const DenseTasks& tasks, int threads) {
    const std::int64_t items = chunk_count(numel, chunk_size);
    std::vector<double> partial(static_cast<std::size_t>(items * tasks.count));
    for_each_chunk(numel, chunk_size, threads, [&](std::int64_t begin, std::int64_t end) {
        dispatch(tasks.dtype, [&](auto tag) {
            using E = typename decltype(tag)::type;
            dot_block(partial.data() + begin / chunk_size * tasks.count, delta + begin,
                      static_cast<const E*>(tasks.data) + begin, tasks.stride, tasks.count, end - begin);
        });
    });
    add_up(out, partial, items, tasks.count);
}

void dots_sparse_cpu(double* out, const float* delta, std::int64_t rows, std::int64_t columns, const SparseTasks& tasks,
                     int threads) {
    std::vector<double> partial(static_cast<std::size_t>(rows * tasks.count));
    for_each_item(
        rows, threads,
        [&](std::int64_t row) {
            with_sparse(tasks, [&](auto* values, auto* places) {
                for (std::int64_t t = 0; t < tasks.count; ++t) {
                    const std::int64_t* starts = tasks.starts + t * tasks.start_stride + row;
                    double total = 0.0;
                    for (std::int64_t i = starts[0]; i < starts[1]; ++i) {
                        total += static_cast<double>(delta[row * columns + places[i]]) * load<double>(values[i]);
                    }
                    partial[static_cast<std::size_t>(row * tasks.count + t)] = total;
                }
            });
        },
        16);
    add_up(out, partial, rows, tasks.count);
}

void add_sparse_products_cpu(float* y, std::int64_t y_stride, const float* x, const float* gates, std::int64_t tokens,
                             std::int64_t rows, std::int64_t columns, const SparseTasks& tasks, int threads) {
    for_each_item(
        rows, threads,
        [&](std::int64_t row) {
            with_sparse(tasks, [&](auto* values, auto* places) {
                for (std::int64_t n = 0; n < tokens; ++n) {
                    const float* token = x + n * columns;
                    float total = 0.0f;
                    for (std::int64_t t = 0; t < tasks.count; ++t) {
                        const std::int64_t* starts = tasks.starts + t * tasks.start_stride + row;
                        // Four sums: one alone would wait for each addition.
                        std::array<float, 4> sums{};
                        std::int64_t i = starts[0];
                        for (; i + 4 <= starts[1]; i += 4) {
                            for (std::size_t k = 0; k < 4; ++k) {
                                const std::int64_t j = i + static_cast<std::int64_t>(k);
                                sums[k] += load<float>(values[j]) * token[places[j]];
                            }
                        }
                        for (; i < starts[1]; ++i) sums[0] += load<float>(values[i]) * token[places[i]];
                        total += gates[n * tasks.count + t] * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
                    }
                    y[n * y_stride + row] += total;
                }
            });
        },
        16);
}

}  // namespace pymerge
