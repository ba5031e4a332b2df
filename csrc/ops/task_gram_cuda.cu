// A block computes one tile of S's lower triangle and mirrors it, on tensor cores: for each task, down all rows, it
// subtracts two strips of W_0 from two of W_t (the tile's rows and columns) on the way to shared memory. Task vectors
// exist nowhere else. The next strips are read from memory while the present ones are multiplied.
//
// An element of tau (float32) is kept as hi + lo, both of a type that tensor cores take:
//   16 bits  base and experts all bfloat16, or all float16, without centring. A difference of two such numbers is one
//            where they are within a factor of two of each other, and then lo is 0. Where it is so for all of two
//            strips, hi hi is exact, and is all that is computed; else hi lo + lo hi + lo lo besides.
//   TF32     everything else: centred task vectors, too, since minus its mean no tau~ fits in 16 bits. hi hi + hi lo +
//            lo hi, within 2^-21 of |tau_i tau_j|.
// Tensor cores round sums towards zero, which adds up: products of strips start at 0, and join the tile in float32.
#include "ops/task_gram.h"

#include "common/device.h"
#include "common/strips.h"
#include "common/tiles.h"

namespace pymerge {
namespace {

constexpr std::int64_t tasks_at_most = 96;  // kernel arguments hold 4 KiB

struct Arguments {
    float* out;
    const float* weights;
    const float* means;
    std::int64_t rows;
    std::int64_t columns;
    int count;
    bool vector;  // 4 columns of any matrix may be loaded at once
    LayersView base;
    LayersView experts[tasks_at_most];
};
static_assert(sizeof(Arguments) <= 4096);

// 4 columns of the rows that a word holds, as they are in memory.
template <Operand operand>
struct Chunk {
    Quad value[rows_per_word<operand>];
    Quad base[rows_per_word<operand>];
};

template <Operand operand, int tile>
struct Shared {
    // By stage, strip (the tile's rows, its columns) and part (hi, lo). The padding keeps reads in different banks.
    std::uint32_t words[2][2][2][strip_words][tile + 8];
    std::int64_t with_lo[2];       // of a stage: the step for which some lo is not 0
    std::int64_t with_special[2];  // and for which something is infinite or NaN
    int tasks[tasks_at_most];      // those whose weight is not 0
    int used;
};

template <Operand operand, int tile>
struct Block {
    static constexpr int threads = tile_threads<tile>;
    static constexpr int chunks = 2 * strip_words * tile / 4 / threads;  // of a thread
    static constexpr int depth = strip_words * rows_per_word<operand>;   // rows of a strip

    const Arguments& a;
    Shared<operand, tile>& s;
    std::int64_t layer, row, column;  // of S, where the tile begins
    std::int64_t steps_of_task;
    Chunk<operand> loaded[chunks];

    struct Position {
        int strip, word, column;
    };

    __device__ __forceinline__ static Position position(int chunk) {
        const int i = static_cast<int>(threadIdx.x) + chunk * threads;
        constexpr int per_strip = strip_words * tile / 4;
        return {i / per_strip, i % per_strip / (tile / 4), i % (tile / 4) * 4};
    }

    __device__ __forceinline__ int task(std::int64_t step) const { return s.tasks[step / steps_of_task]; }

    // The elements of 4 columns that are inside the matrix.
    __device__ __forceinline__ int valid(std::int64_t r, std::int64_t c) const {
        if (r >= a.rows || c >= a.columns) return 0;
        return a.columns - c < 4 ? static_cast<int>(a.columns - c) : 4;
    }

    __device__ __forceinline__ Quad load(const LayersView& m, std::int64_t r, std::int64_t c) const {
        const std::int64_t offset = layer * m.layer_stride + r * m.first.row_stride + c;
        return load_quad<operand>(m.first.data, m.first.dtype, offset, valid(r, c), a.vector);
    }

    __device__ __forceinline__ void fetch(std::int64_t step) {
        const std::int64_t first = step % steps_of_task * depth;
        const LayersView& expert = a.experts[task(step)];
#pragma unroll
        for (int i = 0; i < chunks; ++i) {
            const Position at = position(i);
            const std::int64_t c = (at.strip == 0 ? row : column) + at.column;
#pragma unroll
            for (int h = 0; h < rows_per_word<operand>; ++h) {
                const std::int64_t r = first + at.word * rows_per_word<operand> + h;
                loaded[i].value[h] = load(expert, r, c);
                loaded[i].base[h] = load(a.base, r, c);
            }
        }
    }

    __device__ __forceinline__ void store(std::int64_t step) {
        const std::int64_t first = step % steps_of_task * depth;
        const int t = task(step), stage = static_cast<int>(step % 2);
        const float* mean = a.means == nullptr ? nullptr : a.means + (layer * a.count + t) * a.columns;
#pragma unroll
        for (int i = 0; i < chunks; ++i) {
            const Position at = position(i);
            const std::int64_t c = (at.strip == 0 ? row : column) + at.column;
            float tau[4][rows_per_word<operand>];
#pragma unroll
            for (int h = 0; h < rows_per_word<operand>; ++h) {
                const int inside = valid(first + at.word * rows_per_word<operand> + h, c);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float value = element<operand>(loaded[i].value[h], a.experts[t].first.dtype, e);
                    const float base = element<operand>(loaded[i].base[h], a.base.first.dtype, e);
                    tau[e][h] = task_delta(value, base);
                    if (mean != nullptr && e < inside) tau[e][h] -= mean[c + e];
                }
            }
            const SplitQuad parts = split_quad<operand>(tau);
            if (parts.with_lo) s.with_lo[stage] = step;
            if (parts.with_special) s.with_special[stage] = step;
            *reinterpret_cast<Quad*>(&s.words[stage][at.strip][0][at.word][at.column]) = parts.hi;
            *reinterpret_cast<Quad*>(&s.words[stage][at.strip][1][at.word][at.column]) = parts.lo;
        }
    }

    // Words of a strip as the operands of mma; `finite`: 0 in place of what is not.
    __device__ __forceinline__ void read(std::uint32_t (&left)[4], int stage, int part, bool finite,
                                         const Lane<tile>& lane, int i) const {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            left[r] = s.words[stage][0][part][lane.q + 4 * (r / 2)][lane.row(i, r % 2)];
            if (finite) left[r] = finite_word<operand>(left[r]);
        }
    }

    __device__ __forceinline__ void read(std::uint32_t (&right)[4][2], int stage, int part, bool finite,
                                         const Lane<tile>& lane) const {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                right[j][r] = s.words[stage][1][part][lane.q + 4 * r][lane.warp_column + 8 * j + lane.g];
                if (finite) right[j][r] = finite_word<operand>(right[j][r]);
            }
        }
    }

    __device__ __forceinline__ static void multiply_row(float (&part)[4][4], const std::uint32_t (&left)[4],
                                                        const std::uint32_t (&right)[4][2]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) mma<operand>(part[j], left, right[j]);
    }

    __device__ __forceinline__ void multiply(Square& sum, std::int64_t step, const Lane<tile>& lane) const {
        const int stage = static_cast<int>(step % 2);
        const float weight = a.weights[layer * a.count + task(step)];
        const bool with_lo = s.with_lo[stage] == step, finite = s.with_special[stage] == step;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            std::uint32_t left[4], right[4][2];
            float part[4][4] = {};
            if (with_lo) {  // the small products first
                std::uint32_t left_lo[4];
                read(left_lo, stage, 1, false, lane, i);
                if constexpr (operand != Operand::tf32) {
                    read(right, stage, 1, false, lane);
                    multiply_row(part, left_lo, right);
                }
                read(right, stage, 0, finite, lane);
                multiply_row(part, left_lo, right);
                read(left, stage, 0, finite, lane, i);
                read(right, stage, 1, false, lane);
                multiply_row(part, left, right);
            }
            read(left, stage, 0, false, lane, i);
            read(right, stage, 0, false, lane);
            multiply_row(part, left, right);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[i][j][e] = fmaf(weight, part[j][e], sum[i][j][e]);
            }
        }
    }
};

template <Operand operand, int tile>
__global__ void __launch_bounds__(tile_threads<tile>) task_gram_kernel(const __grid_constant__ Arguments a) {
    alignas(16) __shared__ Shared<operand, tile> s;
    Place place;
    if (!triangle_tile(blockIdx.x, ceil_divide(a.columns, tile), place)) return;
    Block<operand, tile> block{a, s, blockIdx.y, place.row * tile, place.column * tile, 0, {}};
    block.steps_of_task = ceil_divide(a.rows, block.depth);
    if (threadIdx.x == 0) {
        s.used = 0;
        for (int t = 0; t < a.count; ++t) {
            if (a.weights[block.layer * a.count + t] != 0.0f) s.tasks[s.used++] = t;
        }
        for (int stage = 0; stage < 2; ++stage) s.with_lo[stage] = s.with_special[stage] = -1;
    }
    __syncthreads();

    const Lane<tile> lane;
    Square total = {}, sum = {};
    const std::int64_t steps = s.used * block.steps_of_task;
    if (steps > 0) {
        block.fetch(0);
        block.store(0);
    }
    for (std::int64_t step = 0; step < steps; ++step) {
        __syncthreads();  // the step's words are there, and nobody reads those of the one before any more
        if (step + 1 < steps) block.fetch(step + 1);
        block.multiply(sum, step, lane);
        if ((step + 1) % group_strips == 0) add_group(total, sum);
        if (step + 1 < steps) block.store(step + 1);
    }
    add_group(total, sum);

    // Both triangles come from the lower one, so S is symmetric to the last bit.
    float* out = a.out + block.layer * a.columns * a.columns;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const std::int64_t r = block.row + lane.row(i, e / 2), c = block.column + lane.column(j) + e % 2;
                if (r >= a.columns || c > r) continue;
                out[r * a.columns + c] = total[i][j][e];
                out[c * a.columns + r] = total[i][j][e];
            }
        }
    }
}

template <Operand operand, int tile>
void launch(const Arguments& a, std::int64_t layers, cudaStream_t on) {
    const std::int64_t tiles = ceil_divide(a.columns, tile), blocks = ceil_divide(tiles, 2) * (tiles + 1);
    PM_CHECK(blocks < (std::int64_t(1) << 31), "task_gram: " << a.columns << " columns; one launch takes 4 million");
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(layers));
    constexpr int threads = tile_threads<tile>;
    task_gram_kernel<operand, tile><<<grid, threads, 0, on>>>(a);
    PM_CUDA_CHECK(cudaGetLastError());
}

template <Operand operand>
void launch(const Arguments& a, std::int64_t layers, cudaStream_t on) {
    const std::int64_t tiles = ceil_divide(a.columns, 128);
    if (layers * tiles * (tiles + 1) / 2 >= enough_blocks) {
        launch<operand, 128>(a, layers, on);
    } else {
        launch<operand, 64>(a, layers, on);
    }
}

// Checks one of the matrices; true if 4 of its columns may be loaded at once.
bool check_view(const char* label, const LayersView& m, std::int64_t columns) {
    const DType dtype = m.first.dtype;
    PM_CHECK(dtype != DType::f64, "task_gram: " << label << " is float64; this kernel adds in float32, use reference");
    PM_CHECK(m.first.row_stride >= columns,
             "task_gram: " << label << " has row stride " << m.first.row_stride << " for " << columns << " columns");
    const auto bytes = static_cast<std::uintptr_t>(dtype == DType::f32 ? 4 : 2);
    return columns % 4 == 0 && m.first.row_stride % 4 == 0 && m.layer_stride % 4 == 0 &&
           reinterpret_cast<std::uintptr_t>(m.first.data) % (4 * bytes) == 0;
}

}  // namespace

void task_gram_cuda(const TaskGramParams& p, void* stream) {
    PM_CHECK(p.layers >= 0 && p.rows >= 0 && p.columns >= 0,
             "task_gram: " << p.layers << " layers of " << p.rows << " x " << p.columns << " elements");
    PM_CHECK(p.count <= tasks_at_most,
             "task_gram: " << p.count << " experts; one launch takes " << tasks_at_most << ", use --backend reference");
    PM_CHECK(p.layers < 65536, "task_gram: " << p.layers << " layers; one launch takes 65535, split the batch");
    Arguments a{p.out, p.weights, p.means, p.rows, p.columns, static_cast<int>(p.count), true, p.base, {}};
    a.vector = check_view("the base", p.base, p.columns);
    DType common = p.base.first.dtype;
    for (std::int64_t t = 0; t < p.count; ++t) {
        a.vector = check_view("an expert", p.experts[t], p.columns) && a.vector;
        a.experts[t] = p.experts[t];
        if (p.experts[t].first.dtype != common) common = DType::f32;
    }
    if (p.layers == 0 || p.columns == 0) return;
    const auto on = static_cast<cudaStream_t>(stream);
    if (p.means != nullptr || common == DType::f32) {
        launch<Operand::tf32>(a, p.layers, on);
    } else if (common == DType::bf16) {
        launch<Operand::bf16>(a, p.layers, on);
    } else {
        launch<Operand::f16>(a, p.layers, on);
    }
}

}  // namespace pymerge
