#include "ops/low_rank_sum.h"

#include <algorithm>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/tiles_cpu.h"

namespace pymerge {
namespace {

// Columns whose products wait, row by row, to be added to the base.
constexpr std::int64_t most_columns = 512;
static_assert(most_columns % panel_columns == 0);
// Floats of the right factor that stay in a core's second-level cache while all rows are multiplied with them.
constexpr std::int64_t cached = 1 << 16;
// Rows that a thread takes at a time: whole tiles of all instruction sets.
constexpr std::int64_t chunk_rows = 84;

template <class A, class W, class T>
PM_TARGET_CLONES void add_row(T* __restrict out, const W* __restrict base, const A* __restrict product, A scale,
                              std::int64_t n) {
    for (std::int64_t j = 0; j < n; ++j) out[j] = Round<T>::from(load<A>(base[j]) + scale * product[j]);
}

// Rounds W_0 plus the products of n elements of one row, from column `column` on, to the result.
template <class A>
void finish(const LowRankSumParams& p, std::int64_t row, std::int64_t column, const A* product, std::int64_t n) {
    const std::int64_t at = row * p.columns + column;
    dispatch(p.base.dtype, [&](auto base_tag) {
        dispatch(p.out.dtype, [&](auto out_tag) {
            using W = typename decltype(base_tag)::type;
            using T = typename decltype(out_tag)::type;
            add_row<A>(static_cast<T*>(p.out.data) + at, static_cast<const W*>(p.base.data) + at, product,
                       static_cast<A>(p.scale), n);
        });
    });
}

template <class A>
PM_TARGET_CLONES void multiply_row(A* __restrict product, const A* __restrict left, const A* __restrict panel,
                                   std::int64_t rank) {
    std::fill_n(product, panel_columns, A(0));
    for (std::int64_t k = 0; k < rank; ++k) {
        for (std::int64_t j = 0; j < panel_columns; ++j) {
            product[j] = low_rank_step(product[j], left[k], panel[k * panel_columns + j]);
        }
    }
}

// Where there are no tiles, and for float64.
template <class A>
void sum_by_rows(const LowRankSumParams& p, int threads) {
    const A* left = static_cast<const A*>(p.left.data);
    const A* panels = static_cast<const A*>(p.panels.data);
    for_each_item(p.rows, threads, [&](std::int64_t row) {
        for (std::int64_t column = 0; column < p.columns; column += most_columns) {
            A product[most_columns];
            const std::int64_t n = std::min(most_columns, p.columns - column);
            for (std::int64_t at = 0; at < n; at += panel_columns) {
                multiply_row(product + at, left + row * p.rank, panels + (column + at) * p.rank, p.rank);
            }
            finish(p, row, column, product, n);
        }
    });
}

// Sums in float32, with the left factor too laid out as tiles take it.
class Tiled {
  public:
    Tiled(const LowRankSumParams& p, const TileKernels& kernels, int threads)
        : p_(p),
          kernels_(kernels),
          threads_(threads),
          block_(std::clamp(cached / std::max<std::int64_t>(1, p.rank) / panel_columns * panel_columns, panel_columns,
                            most_columns)),
          left_(p.rows * p.rank) {}

    void run() {
        const std::int64_t chunks = chunk_count(p_.rows, chunk_rows);
        for_each_item(chunks, threads_, [&](std::int64_t chunk) {
            for_each_tile(chunk, [&](std::int64_t begin, std::int64_t end) {
                const float* from = static_cast<const float*>(p_.left.data) + begin * p_.rank;
                kernels_.transpose(left_.get() + begin * p_.rank, end - begin, from, p_.rank, end - begin, p_.rank);
            });
        });
        const std::int64_t blocks = chunk_count(p_.columns, block_);
        for_each_item(chunks * blocks, threads_, [&](std::int64_t item) {
            for_each_tile(item % chunks,
                          [&](std::int64_t begin, std::int64_t end) { sum(begin, end, item / chunks * block_); });
        });
    }

  private:
    template <class F>
    void for_each_tile(std::int64_t chunk, F&& f) const {
        const std::int64_t first = chunk * chunk_rows;
        kernels_.for_each_tile(std::min(chunk_rows, p_.rows - first),
                               [&](std::int64_t begin, std::int64_t end) { f(first + begin, first + end); });
    }

    // Rows begin to end, which make one tile, of the columns of one block.
    void sum(std::int64_t begin, std::int64_t end, std::int64_t column) const {
        static constexpr float zeros[most_of_tile] = {};
        float product[most_columns * most_of_tile / 32];
        const std::int64_t rows = end - begin, n = std::min(block_, p_.columns - column), width = kernels_.width;
        const TileKernels::Tile tile = kernels_.tiles[static_cast<std::size_t>(rows - 1)];
        for (std::int64_t at = 0; at < n; at += width) {
            const std::int64_t inside = (column + at) % panel_columns;
            const float* panel = static_cast<const float*>(p_.panels.data) + (column + at - inside) * p_.rank;
            tile(product + at, block_, zeros, 0, left_.get() + begin * p_.rank, rows, panel + inside, panel_columns,
                 p_.rank);
        }
        for (std::int64_t i = 0; i < rows; ++i) finish(p_, begin + i, column, product + i * block_, n);
    }

    const LowRankSumParams& p_;
    const TileKernels& kernels_;
    int threads_;
    std::int64_t block_;  // columns
    Floats left_;
};

}  // namespace

void low_rank_sum_cpu(const LowRankSumParams& p, int threads) {
    PM_CHECK(p.rows >= 0 && p.columns >= 0 && p.rank >= 0,
             "low_rank_sum: " << p.rows << " x " << p.columns << " elements, rank " << p.rank);
    const bool doubled = is_double(p.left);
    PM_CHECK(p.left.dtype == p.panels.dtype && (doubled || p.left.dtype == DType::f32),
             "low_rank_sum: the factors must be float32, or both float64");
    PM_CHECK(doubled || !(is_double(p.base) || p.out.dtype == DType::f64),
             "low_rank_sum: float64 is summed with factors in float64");
    if (p.rows == 0 || p.columns == 0) return;
    if (doubled) {
        sum_by_rows<double>(p, threads);
    } else if (tile_kernels().empty()) {
        sum_by_rows<float>(p, threads);
    } else {
        Tiled(p, tile_kernels().front(), threads).run();
    }
}

}  // namespace pymerge
