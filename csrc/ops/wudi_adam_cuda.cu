// A step is one kernel: a block computes one tile of D A on tensor cores and, without storing it, updates the tile's m
// and v in place and writes the tile's D to the other of two buffers, since other blocks still read the old one.
//
// Float32 by three TF32 products: x = hi + lo, both TF32, and hi hi + hi lo + lo hi, within 2^-21 of the terms' size.
// Tensor cores round sums towards zero, which adds up: each product of 8 columns starts at 0 there, and is added to the
// tile in float32, in groups. Strips of D and A are on their way to shared memory while those before are multiplied.
#include "ops/wudi_adam.h"

#include <cmath>

#include "common/device.h"
#include "common/tiles.h"
#include "ops/wudi_adam_step.h"

namespace pymerge {
namespace {

constexpr int depth = 16;  // columns of D, and rows of A, in shared memory at a time

struct Arguments {
    float* target;
    const float* source;
    float* m;
    float* v;
    const float* A;
    const float* B;
    const double* lr;
    std::int64_t rows;
    std::int64_t columns;
    double correction1;
    AdamFactors<float> factors;  // all but the step, which depends on the layer
    bool vector;                 // every row begins at a multiple of 16 bytes
};

// 4 elements of a rows x columns matrix, zeros outside it.
__device__ __forceinline__ void copy_four(float* shared, const float* matrix, std::int64_t row, std::int64_t column,
                                          std::int64_t rows, std::int64_t columns, bool vector) {
    const float* from = matrix + row * columns + column;
    if (vector) {
        const bool outside = row >= rows || column >= columns;
        copy_async<16>(shared, outside ? matrix : from, outside);
        return;
    }
    for (int e = 0; e < 4; ++e) {
        const bool outside = row >= rows || column + e >= columns;
        copy_async<4>(shared + e, outside ? matrix : from + e, outside);
    }
}

// x = hi + lo. Tensor cores leave out lo's last bit, one of x's 24 at most. Of a NaN of all ones, lo has it.
__device__ __forceinline__ void split(float x, std::uint32_t& hi, std::uint32_t& lo) {
    hi = round_tf32(x);
    lo = bit_copy<std::uint32_t>(x - bit_copy<float>(hi));
}

template <int tile>
struct Strips {
    float left[tile][depth + 4];   // of D; the padding keeps a warp's reads in different banks
    float right[depth][tile + 8];  // of A

    __device__ __forceinline__ void start(const float* D, const float* A, std::int64_t row, std::int64_t column,
                                          std::int64_t k, const Arguments& a) {
        for (int i = static_cast<int>(threadIdx.x); i < tile * depth / 4; i += tile_threads<tile>) {
            const int r = i / (depth / 4), c = i % (depth / 4) * 4;
            copy_four(&left[r][c], D, row + r, k + c, a.rows, a.columns, a.vector);
        }
        for (int i = static_cast<int>(threadIdx.x); i < tile * depth / 4; i += tile_threads<tile>) {
            const int r = i / (tile / 4), c = i % (tile / 4) * 4;
            copy_four(&right[r][c], A, k + r, column + c, a.columns, a.columns, a.vector);
        }
    }

    __device__ __forceinline__ void multiply(Square& sum, const Lane<tile>& lane) const {
#pragma unroll
        for (int k = 0; k < depth; k += 8) {
            std::uint32_t b_hi[4][2], b_lo[4][2];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    split(right[k + lane.q + 4 * r][lane.warp_column + 8 * j + lane.g], b_hi[j][r], b_lo[j][r]);
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                std::uint32_t a_hi[4], a_lo[4];
#pragma unroll
                for (int r = 0; r < 4; ++r) {
                    split(left[lane.row(i, r % 2)][k + lane.q + 4 * (r / 2)], a_hi[r], a_lo[r]);
                }
                // The small products first. Four sums side by side: each alone would wait for itself.
                float part[4][4] = {};
#pragma unroll
                for (int j = 0; j < 4; ++j) mma<Operand::tf32>(part[j], a_lo, b_hi[j]);
#pragma unroll
                for (int j = 0; j < 4; ++j) mma<Operand::tf32>(part[j], a_hi, b_lo[j]);
#pragma unroll
                for (int j = 0; j < 4; ++j) mma<Operand::tf32>(part[j], a_hi, b_hi[j]);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) sum[i][j][e] += part[j][e];
                }
            }
        }
    }
};

struct alignas(8) Pair {
    float x[2];
};

// Two elements that follow each other; the second is left out where it is outside the matrix.
__device__ __forceinline__ Pair load_pair(const float* from, bool vector, bool both) {
    if (vector) return *reinterpret_cast<const Pair*>(from);
    return {from[0], both ? from[1] : 0.0f};
}

__device__ __forceinline__ void store_pair(float* to, const Pair& pair, bool vector, bool both) {
    if (vector) {
        *reinterpret_cast<Pair*>(to) = pair;
        return;
    }
    to[0] = pair.x[0];
    if (both) to[1] = pair.x[1];
}

template <int tile>
__global__ void __launch_bounds__(tile_threads<tile>) wudi_adam_kernel(const __grid_constant__ Arguments a) {
    alignas(16) __shared__ Strips<tile> strips[2];
    const std::int64_t layer = blockIdx.y;
    const Place place = grouped_tile(blockIdx.x, ceil_divide(a.rows, tile), ceil_divide(a.columns, tile));
    const std::int64_t row = place.row * tile, column = place.column * tile, first = layer * a.rows * a.columns;
    const float* D = a.source + first;
    const float* A = a.A + layer * a.columns * a.columns;
    const Lane<tile> lane;

    Square product = {}, sum = {};
    strips[0].start(D, A, row, column, 0, a);
    int stage = 0;
    for (std::int64_t k = 0; k < a.columns; k += depth) {
        wait_for_copies();
        __syncthreads();  // all copies are there, and nobody reads the other stage any more
        if (k + depth < a.columns) strips[1 - stage].start(D, A, row, column, k + depth, a);
        strips[stage].multiply(sum, lane);
        if ((k / depth + 1) % group_strips == 0) add_group(product, sum);
        stage = 1 - stage;
    }
    add_group(product, sum);

    AdamFactors<float> factors = a.factors;
    factors.step = static_cast<float>(-a.lr[layer] / a.correction1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const std::int64_t r = row + lane.row(i, h), c = column + lane.column(j);
                if (r >= a.rows || c >= a.columns) continue;
                const std::int64_t at = first + r * a.columns + c;
                const bool both = c + 1 < a.columns;
                Pair moved = load_pair(a.source + at, a.vector, both), m = load_pair(a.m + at, a.vector, both);
                Pair v = load_pair(a.v + at, a.vector, both);
                const Pair B = load_pair(a.B + at, a.vector, both);
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    adam_update(moved.x[e], m.x[e], v.x[e], product[i][j][2 * h + e], B.x[e], factors);
                }
                store_pair(a.m + at, m, a.vector, both);
                store_pair(a.v + at, v, a.vector, both);
                store_pair(a.target + at, moved, a.vector, both);
            }
        }
    }
}

template <int tile>
void launch(const Arguments& a, std::int64_t layers, cudaStream_t on) {
    const std::int64_t blocks = ceil_divide(a.rows, tile) * ceil_divide(a.columns, tile);
    PM_CHECK(blocks < (std::int64_t(1) << 31),
             "wudi_adam: " << a.rows << " x " << a.columns << " elements; one launch takes fewer, use reference");
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(layers));
    constexpr int threads = tile_threads<tile>;
    wudi_adam_kernel<tile><<<grid, threads, 0, on>>>(a);
    PM_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void wudi_adam_cuda(const WudiAdamParams& p, void* stream) {
    PM_CHECK(p.layers >= 0 && p.rows >= 0 && p.columns >= 0,
             "wudi_adam: " << p.layers << " layers of " << p.rows << " x " << p.columns << " elements");
    PM_CHECK(p.layers < 65536, "wudi_adam: " << p.layers << " layers; one launch takes 65535, split the batch");
    if (p.layers == 0 || p.rows == 0 || p.columns == 0) return;
    bool vector = p.columns % 4 == 0;
    for (const float* data : {p.A, p.B, static_cast<const float*>(p.D), static_cast<const float*>(p.other),
                              static_cast<const float*>(p.m), static_cast<const float*>(p.v)}) {
        vector = vector && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
    }
    const bool large = p.layers * ceil_divide(p.rows, 128) * ceil_divide(p.columns, 128) >= enough_blocks;
    for (std::int64_t step = 1; step <= p.iterations; ++step) {
        AdamParams adam{};
        adam.beta1 = p.beta1;
        adam.beta2 = p.beta2;
        adam.correction1 = 1.0 - std::pow(p.beta1, static_cast<double>(step));
        adam.correction2 = std::sqrt(1.0 - std::pow(p.beta2, static_cast<double>(step)));
        adam.eps = p.eps;
        const bool odd = step % 2 == 1;
        const Arguments a{odd ? p.other : p.D, odd ? p.D : p.other,      p.m,   p.v, p.A, p.B, p.lr, p.rows, p.columns,
                          adam.correction1,    AdamFactors<float>(adam), vector};
        if (large) {
            launch<128>(a, p.layers, static_cast<cudaStream_t>(stream));
        } else {
            launch<64>(a, p.layers, static_cast<cudaStream_t>(stream));
        }
    }
}

}  // namespace pymerge
