// The plain form, for devices without Triton: float32 multiply-adds, no tensor cores. kernels/task_gram.py has those.
// A block computes one tile x tile piece of S's lower triangle and mirrors it; a thread keeps micro x micro sums in
// registers, so that a value from shared memory serves micro multiply-adds. Task vectors exist only in shared memory.
#include "ops/task_gram.h"

#include "common/device.h"

namespace pymerge {
namespace {

constexpr int tile = 64;   // a block computes tile x tile elements of S
constexpr int depth = 16;  // rows of tau in shared memory at a time
constexpr int side = 16;   // threads a side; each owns micro x micro elements
constexpr int micro = tile / side;
constexpr int threads = side * side;

// Rows summed in one register before they are added to the total: rounding errors grow with the square roots of this
// and of the number of groups, and not with that of all rows.
constexpr std::int64_t group = 256;
static_assert(group % depth == 0);

constexpr std::int64_t tasks_at_most = 96;  // kernel arguments hold 4 KiB

struct Task {
    MatrixView expert;
    const float* mean;  // columns values, or null
    float weight;
};

struct Arguments {
    float* out;
    MatrixView base;
    std::int64_t rows;
    std::int64_t columns;
    int count;
    Task tasks[tasks_at_most];
};
static_assert(sizeof(Arguments) <= 4096);

// Tile rows k and n - 1 - k of a lower triangle of n rows have n + 1 tiles together: they make one row of the grid,
// which is n + 1 wide and half of n high. False for the half row that is left over when n is odd.
__device__ __forceinline__ bool tile_position(std::int64_t tiles, std::int64_t& row, std::int64_t& column) {
    row = blockIdx.y;
    column = blockIdx.x;
    if (column <= row) return true;
    if (2 * row + 1 == tiles) return false;
    column -= row + 1;
    row = tiles - 1 - row;
    return true;
}

// tau~ at (row, column), and 0 outside the matrix: centring must not reach the padding.
__device__ __forceinline__ float task_element(
    const Arguments& a, const Task& task, std::int64_t row, std::int64_t column) {
    if (row >= a.rows || column >= a.columns) return 0.0f;
    const float value = load_at<float>(task.expert.data, task.expert.dtype, row * task.expert.row_stride + column);
    const float base = load_at<float>(a.base.data, a.base.dtype, row * a.base.row_stride + column);
    const float tau = task_delta(value, base);
    return task.mean == nullptr ? tau : tau - task.mean[column];
}

// Loads depth rows of the tile's columns; neighbouring threads read neighbouring columns.
__device__ __forceinline__ void load_strip(
    float (&strip)[depth][tile], const Arguments& a, const Task& task, std::int64_t first_row,
    std::int64_t first_column) {
    for (int i = threadIdx.x; i < depth * tile; i += threads) {
        strip[i / tile][i % tile] = task_element(a, task, first_row + i / tile, first_column + i % tile);
    }
}

template <class F>
__device__ __forceinline__ void for_each_element(F&& f) {
#pragma unroll
    for (int i = 0; i < micro; ++i) {
#pragma unroll
        for (int j = 0; j < micro; ++j) f(i, j);
    }
}

__global__ void __launch_bounds__(threads) task_gram_kernel(const __grid_constant__ Arguments a) {
    __shared__ float left[depth][tile];
    __shared__ float right[depth][tile];
    std::int64_t tile_row, tile_column;
    if (!tile_position((a.columns + tile - 1) / tile, tile_row, tile_column)) return;
    const int ty = static_cast<int>(threadIdx.x) / side;
    const int tx = static_cast<int>(threadIdx.x) % side;

    float result[micro][micro] = {};
    for (int t = 0; t < a.count; ++t) {
        const Task& task = a.tasks[t];
        float total[micro][micro] = {};
        for (std::int64_t start = 0; start < a.rows; start += group) {
            const std::int64_t stop = start + group < a.rows ? start + group : a.rows;
            float sum[micro][micro] = {};
            for (std::int64_t row = start; row < stop; row += depth) {
                load_strip(left, a, task, row, tile_row * tile);
                load_strip(right, a, task, row, tile_column * tile);
                __syncthreads();
#pragma unroll
                for (int k = 0; k < depth; ++k) {
                    for_each_element([&](int i, int j) {
                        sum[i][j] = fmaf(left[k][ty * micro + i], right[k][tx * micro + j], sum[i][j]);
                    });
                }
                __syncthreads();
            }
            for_each_element([&](int i, int j) { total[i][j] += sum[i][j]; });
        }
        for_each_element([&](int i, int j) { result[i][j] = fmaf(task.weight, total[i][j], result[i][j]); });
    }

    // Both triangles come from the lower one, so S is symmetric to the last bit.
    for_each_element([&](int i, int j) {
        const std::int64_t row = tile_row * tile + ty * micro + i;
        const std::int64_t column = tile_column * tile + tx * micro + j;
        if (row < a.columns && column <= row) {
            a.out[row * a.columns + column] = result[i][j];
            a.out[column * a.columns + row] = result[i][j];
        }
    });
}

void check_view(const char* label, const MatrixView& m, std::int64_t columns) {
    PM_CHECK(m.dtype != DType::f64, "task_gram: " << label << " is float64; this kernel adds in float32, use reference");
    PM_CHECK(m.row_stride >= columns,
             "task_gram: " << label << " has row stride " << m.row_stride << " for " << columns << " columns");
}

}  // namespace

void task_gram_cuda(const TaskGramParams& p, void* stream) {
    PM_CHECK(p.rows >= 0 && p.columns >= 0, "task_gram: " << p.rows << " x " << p.columns << " elements");
    PM_CHECK(p.count <= tasks_at_most,
             "task_gram: " << p.count << " experts; one launch takes " << tasks_at_most << ", use --backend reference");
    check_view("the base", p.base, p.columns);
    if (p.columns == 0) return;
    Arguments a{p.out, p.base, p.rows, p.columns, static_cast<int>(p.count), {}};
    for (std::int64_t t = 0; t < p.count; ++t) {
        check_view("an expert", p.experts[t], p.columns);
        a.tasks[t] = {p.experts[t], p.means == nullptr ? nullptr : p.means + t * p.columns,
                      static_cast<float>(p.weights[t])};
    }
    const std::int64_t tiles = (p.columns + tile - 1) / tile;
    const std::int64_t grid_rows = (tiles + 1) / 2;
    PM_CHECK(grid_rows < 65536, "task_gram: " << p.columns << " columns; one launch takes 8 million");
    const dim3 grid(static_cast<unsigned>(tiles + 1), static_cast<unsigned>(grid_rows));
    task_gram_kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(a);
    PM_CUDA_CHECK(cudaGetLastError());
}

}  // namespace pymerge
