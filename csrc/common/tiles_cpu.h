// Tiles of products in vector registers, for the instruction sets that have fused multiply-adds.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/huge_pages.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define PM_TILES 1
#endif

namespace pymerge {

// Floats of the largest tile of all instruction sets.
constexpr std::int64_t most_of_tile = 14 * 32;

// The functions of tile_kernels.h for one instruction set.
struct TileKernels {
    using Tile = void (*)(float* y, std::int64_t y_stride, const float* from, std::int64_t from_stride, const float* a,
                          std::int64_t a_stride, const float* b, std::int64_t b_stride, std::int64_t depth);
    using Mix = void (*)(float* out, std::int64_t out_stride, const float* from, std::int64_t from_stride,
                         const float* tau, std::int64_t count, const float* gates, std::int64_t gate_stride,
                         std::int64_t samples, std::int64_t n);
    using Transpose = void (*)(float* to, std::int64_t to_stride, const float* from, std::int64_t from_stride,
                               std::int64_t rows, std::int64_t columns);
    using Dots = void (*)(double* out, const float* a, const float* b, std::int64_t count, std::int64_t n);

    int lanes;  // floats in a register
    std::int64_t width;
    std::vector<Tile> tiles;  // tiles[m - 1] has m rows
    Mix mix;
    Transpose transpose;
    Dots dots;

    std::int64_t most_rows() const { return static_cast<std::int64_t>(tiles.size()); }
    // Calls f(begin, end) for each of the fewest tiles, of about the same size, that `rows` rows are cut into.
    template <class F>
    void for_each_tile(std::int64_t rows, F&& f) const {
        const std::int64_t count = (rows + most_rows() - 1) / most_rows();
        for (std::int64_t i = 0; i < count; ++i) f(rows * i / count, rows * (i + 1) / count);
    }
};

#if defined(PM_TILES)
namespace avx512 {
#define PM_ARCH __attribute__((target("arch=x86-64-v4"), optimize("fp-contract=fast")))
constexpr std::int64_t lanes = 16;
constexpr int most_rows = 14;
#include "common/tile_kernels.h"
#undef PM_ARCH
}  // namespace avx512

namespace avx2 {
#define PM_ARCH __attribute__((target("arch=x86-64-v3"), optimize("fp-contract=fast")))
constexpr std::int64_t lanes = 8;
constexpr int most_rows = 6;
#include "common/tile_kernels.h"
#undef PM_ARCH
}  // namespace avx2
#endif

// Those that this machine runs, the best first.
inline const std::vector<TileKernels>& tile_kernels() {
    static const std::vector<TileKernels> found = [] {
        std::vector<TileKernels> kernels;
#if defined(PM_TILES)
        if (__builtin_cpu_supports("x86-64-v4")) kernels.push_back(avx512::kernels());
        if (__builtin_cpu_supports("x86-64-v3")) kernels.push_back(avx2::kernels());
#endif
        return kernels;
    }();
    return found;
}

inline const TileKernels& tile_kernels(int lanes) {
    for (const TileKernels& kernels : tile_kernels()) {
        if (kernels.lanes == lanes) return kernels;
    }
    PM_CHECK(false, "no tiles for registers of " << lanes << " floats on this machine; take one of routed_lanes()");
}

// Room for n floats at the start of a cache line.
class Floats {
  public:
    explicit Floats(std::int64_t n) : data_(allocate(n)) {}
    float* get() const { return data_.get(); }

  private:
    static constexpr std::align_val_t line{64};
    struct Free {
        void operator()(float* data) const { ::operator delete[](data, line); }
    };
    static float* allocate(std::int64_t n) {
        const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(float);
        void* data = ::operator new[](bytes, line);
        ask_for_huge_pages(data, static_cast<std::int64_t>(bytes));
        return static_cast<float*>(data);
    }
    std::unique_ptr<float[], Free> data_;
};

}  // namespace pymerge
