// Tiles of W_0 and of task vectors in float32, from any way in which they are stored.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/task_storage.h"
#include "common/tiles_cpu.h"

namespace pymerge {
namespace {

template <class W>
PM_TARGET_CLONES void read_row(float* __restrict to, const W* __restrict from, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = load<float>(from[i]);
}

// Calls f(values, columns) with typed pointers.
template <class F>
void with_sparse(const SparseTasks& tasks, F&& f) {
    dispatch(tasks.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const T* values = static_cast<const T*>(tasks.values);
        if (tasks.wide) {
            f(values, static_cast<const std::int32_t*>(tasks.columns));
        } else {
            f(values, static_cast<const std::uint16_t*>(tasks.columns));
        }
    });
}

// Rows row to row + height and columns column to column + width of a weight.
struct Window {
    std::int64_t row, height, column, width;
};

// Reads windows of W_0 and of the task vectors whose columns begin at multiples of `step` and are at most as many.
class TaskTiles {
  public:
    TaskTiles(const RoutedWeight& weight, std::int64_t step, const TileKernels& kernels, int threads)
        : weight_(weight), step_(step), parts_(chunk_count(weight.columns, step)), kernels_(kernels) {
        if (weight.sparse != nullptr) split_rows(*weight.sparse, threads);
    }

    // to[r * stride + c], or to[c * stride + r] where `transposed`. `room` takes a window.
    void base(float* to, std::int64_t stride, const Window& w, bool transposed, float* room) const {
        dense(to, stride, weight_.base.data, weight_.base.dtype, 0, w, transposed, room);
    }

    void task(std::int64_t t, float* to, std::int64_t stride, const Window& w, bool transposed, float* room) const {
        if (weight_.dense != nullptr) {
            dense(to, stride, weight_.dense->data, weight_.dense->dtype, t * weight_.dense->stride, w, transposed,
                  room);
            return;
        }
        const std::int64_t down = transposed ? 1 : stride, across = transposed ? stride : 1;
        std::fill_n(to, (transposed ? w.width : w.height) * stride, 0.0f);
        with_sparse(*weight_.sparse, [&](auto* values, auto* columns) {
            for (std::int64_t r = 0; r < w.height; ++r) {
                const std::int64_t* bounds = bounds_of(t, w.row + r) + w.column / step_;
                float* row = to + r * down;
                for (std::int64_t i = bounds[0]; i < bounds[1]; ++i) {
                    row[(columns[i] - w.column) * across] = load<float>(values[i]);
                }
            }
        });
    }

  private:
    void dense(float* to, std::int64_t stride, const void* data, DType dtype, std::int64_t offset, const Window& w,
               bool transposed, float* room) const {
        dispatch(dtype, [&](auto tag) {
            using E = typename decltype(tag)::type;
            const E* from = static_cast<const E*>(data) + offset + w.row * weight_.columns + w.column;
            if constexpr (std::is_same_v<E, float>) {
                if (transposed) {
                    kernels_.transpose(to, stride, from, weight_.columns, w.height, w.width);
                    return;
                }
            }
            float* rows = transposed ? room : to;
            const std::int64_t rows_stride = transposed ? w.width : stride;
            for (std::int64_t r = 0; r < w.height; ++r) {
                read_row(rows + r * rows_stride, from + r * weight_.columns, w.width);
            }
            if (transposed) kernels_.transpose(to, stride, room, w.width, w.height, w.width);
        });
    }

    // Where the entries of row r of task t pass each multiple of the step.
    const std::int64_t* bounds_of(std::int64_t t, std::int64_t r) const {
        return bounds_.get() + (t * weight_.rows + r) * (parts_ + 1);
    }

    void split_rows(const SparseTasks& tasks, int threads) {
        bounds_ = std::make_unique_for_overwrite<std::int64_t[]>(
            static_cast<std::size_t>(tasks.count * weight_.rows * (parts_ + 1)));
        std::vector<std::uint8_t> wrong(static_cast<std::size_t>(weight_.rows));
        for_each_item(
            weight_.rows, threads,
            [&](std::int64_t r) {
                with_sparse(tasks, [&](auto* values, auto* columns) {
                    static_cast<void>(values);
                    for (std::int64_t t = 0; t < tasks.count; ++t) {
                        const std::int64_t* starts = tasks.starts + t * tasks.start_stride + r;
                        std::int64_t* bounds = bounds_.get() + (t * weight_.rows + r) * (parts_ + 1);
                        std::int64_t part = 0, before = -1;
                        bool ascending = true;
                        for (std::int64_t i = starts[0]; i < starts[1]; ++i) {
                            const std::int64_t column = columns[i];
                            ascending &= column > before && column < weight_.columns;
                            before = column;
                            while (part <= parts_ && part * step_ <= column) bounds[part++] = i;
                        }
                        while (part <= parts_) bounds[part++] = starts[1];
                        if (!ascending) wrong[static_cast<std::size_t>(r)] = 1;
                    }
                });
            },
            16);
        for (std::int64_t r = 0; r < weight_.rows; ++r) {
            PM_CHECK(!wrong[static_cast<std::size_t>(r)],
                     "routed_linear: columns of row " << r << " of a sparse task vector do not ascend from 0 to "
                                                      << weight_.columns - 1
                                                      << "; sort the entries of each row by their columns, each once");
        }
    }

    const RoutedWeight& weight_;
    std::int64_t step_, parts_;
    const TileKernels& kernels_;
    std::unique_ptr<std::int64_t[]> bounds_;
};

}  // namespace
}  // namespace pymerge
