#include "common/parallel.h"
#include "common/task_tiles.h"
#include "common/tiles_cpu.h"
#include "ops/routed_linear.h"

namespace pymerge {
namespace {

// The part of dW_s = dy_s^T x_s that exists at a time, and the columns whose sums are added one after another. Results
// depend on all three.
constexpr std::int64_t block_rows = 96;
constexpr std::int64_t block_columns = 32;
constexpr std::int64_t item_columns = 512;

// One gradient with everything that its threads share.
class Gradient {
  public:
    Gradient(const RoutedGates& p, const TileKernels& kernels, int threads)
        : p_(p),
          kernels_(kernels),
          threads_(threads),
          tiles_(p.weight, block_columns, kernels, threads),
          packed_(chunk_count(p.weight.columns, block_columns) * block_columns * p.ends[p.samples]) {
        pack();
    }

    void run() const {
        const std::int64_t across = chunk_count(p_.weight.columns, item_columns);
        const std::int64_t items = chunk_count(p_.weight.rows, block_rows) * across;
        const std::int64_t numbers = p_.samples * p_.weight.count;
        const std::int64_t slots = std::clamp<std::int64_t>(items, 1, std::max(threads_, 1));
        const std::int64_t block = block_rows * block_columns;
        const std::int64_t room = (2 + p_.weight.count) * block;
        const Floats rooms(slots * room);
        std::vector<double> partial(static_cast<std::size_t>(items * numbers));
        std::vector<double> dots(static_cast<std::size_t>(slots * p_.weight.count));
        for_each_item(slots, threads_, [&](std::int64_t slot) {
            for (std::int64_t item = items * slot / slots; item < items * (slot + 1) / slots; ++item) {
                const std::int64_t begin = item % across * item_columns;
                const std::int64_t end = std::min(begin + item_columns, p_.weight.columns);
                for (std::int64_t column = begin; column < end; column += block_columns) {
                    add_block(partial.data() + item * numbers, item / across * block_rows, column,
                              rooms.get() + slot * room, dots.data() + slot * p_.weight.count);
                }
            }
        });
        std::fill_n(p_.out, numbers, 0.0);
        for (std::int64_t item = 0; item < items; ++item) {
            for (std::int64_t i = 0; i < numbers; ++i) {
                p_.out[i] += partial[static_cast<std::size_t>(item * numbers + i)];
            }
        }
    }

  private:
    // x, block_columns columns at a time, with 0 right of the last column.
    void pack() const {
        const std::int64_t tokens = p_.ends[p_.samples], columns = p_.weight.columns;
        for_each_chunk(tokens, 64, threads_, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t column = 0; column < columns; column += block_columns) {
                const std::int64_t width = std::min(block_columns, columns - column);
                float* to = packed_.get() + column / block_columns * tokens * block_columns;
                for (std::int64_t k = begin; k < end; ++k) {
                    float* row = to + k * block_columns;
                    std::copy_n(p_.x + k * columns + column, width, row);
                    std::fill(row + width, row + block_columns, 0.0f);
                }
            }
        });
    }

    // Adds this part's <dW_s, tau_t> for all samples and tasks.
    void add_block(double* out, std::int64_t row, std::int64_t column, float* room, double* dots) const {
        const std::int64_t count = p_.weight.count, most = block_rows * block_columns;
        const Window window{row, std::min(block_rows, p_.weight.rows - row), column,
                            std::min(block_columns, p_.weight.columns - column)};
        const std::int64_t n = window.height * block_columns;
        float *delta = room + most, *taus = delta + most;
        std::fill_n(taus, count * n, 0.0f);  // right of the last column
        for (std::int64_t t = 0; t < count; ++t) tiles_.task(t, taus + t * n, block_columns, window, false, room);
        for (std::int64_t s = 0; s < p_.samples; ++s) {
            const std::int64_t tokens = p_.ends[s + 1] - p_.ends[s];
            if (tokens == 0) continue;
            const float* x =
                packed_.get() + (column / block_columns * p_.ends[p_.samples] + p_.ends[s]) * block_columns;
            multiply(delta, p_.dy + p_.ends[s] * p_.weight.rows + row, x, tokens, window);
            kernels_.dots(dots, delta, taus, count, n);
            for (std::int64_t t = 0; t < count; ++t) out[s * count + t] += dots[t];
        }
    }

    // delta = dy^T x for this part.
    void multiply(float* delta, const float* dy, const float* x, std::int64_t tokens, const Window& window) const {
        static constexpr float zeros[block_columns] = {};
        kernels_.for_each_tile(window.height, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t c = 0; c < block_columns; c += kernels_.width) {
                kernels_.tiles[static_cast<std::size_t>(end - begin - 1)](delta + begin * block_columns + c,
                                                                          block_columns, zeros, 0, dy + begin,
                                                                          p_.weight.rows, x + c, block_columns, tokens);
            }
        });
    }

    const RoutedGates& p_;
    const TileKernels& kernels_;
    int threads_;
    TaskTiles tiles_;
    Floats packed_;
};

}  // namespace

void routed_gates_cpu(const RoutedGates& p, int lanes, int threads) { Gradient(p, tile_kernels(lanes), threads).run(); }

}  // namespace pymerge
