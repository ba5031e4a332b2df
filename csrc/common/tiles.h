// How the .cu files divide a product: tiles of a matrix among blocks, 32 x 32 squares of a tile among warps.
#pragma once

#include "common/dtype.h"
#include "common/mma.h"

namespace pymerge {

constexpr int square = 32;  // rows and columns of a tile that one warp computes

template <int tile>
constexpr int tile_threads = tile / square * (tile / square) * 32;

// A smaller tile is taken where the larger one would leave multiprocessors idle: an A100 has 108, an H100 132. Sums do
// not depend on the tile.
constexpr std::int64_t enough_blocks = 108;

PM_HOST_DEVICE constexpr std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

struct Place {
    std::int64_t row;
    std::int64_t column;
};

// Tile number `place` of rows x columns tiles, 8 rows at a time, column by column: blocks that run together then read
// 8 row strips and a few column strips, which stay in L2.
PM_HOST_DEVICE Place grouped_tile(std::int64_t place, std::int64_t rows, std::int64_t columns) {
    constexpr std::int64_t group_rows = 8;
    const std::int64_t first = place / (group_rows * columns) * group_rows;
    const std::int64_t height = rows - first < group_rows ? rows - first : group_rows;
    const std::int64_t inside = place % (group_rows * columns);
    return {first + inside % height, inside / height};
}

// Tile `number` of the lower triangle of tiles x tiles. Tile rows k and n - 1 - k of a lower triangle of n rows have
// n + 1 tiles together: they make one row of a grid, which is n + 1 wide and half of n high. False for the half row
// that is left over when n is odd.
PM_HOST_DEVICE bool triangle_tile(std::int64_t number, std::int64_t tiles, Place& place) {
    place = grouped_tile(number, ceil_divide(tiles, 2), tiles + 1);
    if (place.column <= place.row) return true;
    if (2 * place.row + 1 == tiles) return false;
    place = {tiles - 1 - place.row, place.column - place.row - 1};
    return true;
}

// Where this thread's warp and lane work inside a tile.
template <int tile>
struct Lane {
    int warp_row, warp_column;  // of the tile, where the warp's square begins
    int g, q;                   // as in mma.h

    __device__ __forceinline__ Lane() {
        const int thread = static_cast<int>(threadIdx.x);
        constexpr int warps = tile / square;  // in a row
        warp_row = thread / 32 / warps * square;
        warp_column = thread / 32 % warps * square;
        g = thread % 32 / 4;
        q = thread % 4;
    }

    // Row and column, inside the tile, of results 2 h and 2 h + 1 of product (i, j); the second is one column on.
    __device__ __forceinline__ int row(int i, int h) const { return warp_row + 16 * i + 8 * h + g; }
    __device__ __forceinline__ int column(int j) const { return warp_column + 8 * j + 2 * q; }
};

// A warp's square: 2 x 4 products of 16 x 8.
using Square = float[2][4][4];

// Strips summed in one register before they are added to the total: rounding errors grow with the square roots of this
// and of the number of groups, and not with that of all strips.
constexpr std::int64_t group_strips = 32;

// total += sum, and sum = 0.
__device__ __forceinline__ void add_group(Square& total, Square& sum) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                total[i][j][e] += sum[i][j][e];
                sum[i][j][e] = 0.0f;
            }
        }
    }
}

// x rounded to TF32's 11 significant bits, to the nearest. Of NaN, NaN or 0.
PM_HOST_DEVICE std::uint32_t round_tf32(float x) { return (bit_copy<std::uint32_t>(x) + 0x1000u) & 0xffffe000u; }

}  // namespace pymerge
