// Inner loops of products with small tiles, in vector registers. Included once for each instruction set, inside a
// namespace of its own that defines
//   PM_ARCH             attributes that compile a function for the instruction set, with fused multiply-adds
//   std::int64_t lanes  floats in a register
//   int most_rows       rows of the largest tile whose sums stay in registers
// There is no include guard. Every element's sums have one order on all instruction sets: the same bits.

typedef float Vec __attribute__((vector_size(4 * lanes)));
typedef float Loose __attribute__((vector_size(4 * lanes), aligned(4), may_alias));  // at any address

constexpr std::int64_t width = 2 * lanes;  // columns of a tile

PM_ARCH inline Vec read(const float* from) { return *reinterpret_cast<const Loose*>(from); }
PM_ARCH inline void write(float* to, Vec value) { *reinterpret_cast<Loose*>(to) = value; }

// y[i][j] = from[i][j] + sum_k a[k][i] b[k][j] for M rows i and `width` columns j.
template <int M>
PM_ARCH void tile(float* y, std::int64_t y_stride, const float* from, std::int64_t from_stride, const float* a,
                  std::int64_t a_stride, const float* b, std::int64_t b_stride, std::int64_t depth) {
    // Results lie far apart, where the hardware does not foresee them.
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        __builtin_prefetch(y + i * y_stride, 1);
        __builtin_prefetch(y + i * y_stride + width - 1, 1);
    }
    Vec sums[M][2];
    for (int i = 0; i < M; ++i) sums[i][0] = sums[i][1] = Vec{};
    for (std::int64_t k = 0; k < depth; ++k) {
        const Vec left = read(b + k * b_stride), right = read(b + k * b_stride + lanes);
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const Vec factor = a[k * a_stride + i] - Vec{};  // broadcast: + 0 would be an addition, of -0
            sums[i][0] += factor * left;
            sums[i][1] += factor * right;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
        const float* start = from + i * from_stride;
        write(y + i * y_stride, read(start) + sums[i][0]);
        write(y + i * y_stride + lanes, read(start + lanes) + sums[i][1]);
    }
}

// out[s] = from[s] + sum_t gates[s][t] tau[t] for K samples s of n elements, a multiple of `width`.
template <int K>
PM_ARCH void mix_of(float* out, std::int64_t out_stride, const float* from, std::int64_t from_stride, const float* tau,
                    std::int64_t count, const float* gates, std::int64_t gate_stride, std::int64_t n) {
    for (std::int64_t at = 0; at < n; at += width) {
        Vec sums[K][2];
#pragma GCC unroll 4
        for (int s = 0; s < K; ++s) {
            sums[s][0] = read(from + s * from_stride + at);
            sums[s][1] = read(from + s * from_stride + at + lanes);
        }
        for (std::int64_t t = 0; t < count; ++t) {
            const Vec left = read(tau + t * n + at), right = read(tau + t * n + at + lanes);
#pragma GCC unroll 4
            for (int s = 0; s < K; ++s) {
                const Vec gate = gates[s * gate_stride + t] - Vec{};
                sums[s][0] += gate * left;
                sums[s][1] += gate * right;
            }
        }
#pragma GCC unroll 4
        for (int s = 0; s < K; ++s) {
            write(out + s * out_stride + at, sums[s][0]);
            write(out + s * out_stride + at + lanes, sums[s][1]);
        }
    }
}

PM_ARCH inline void mix(float* out, std::int64_t out_stride, const float* from, std::int64_t from_stride,
                        const float* tau, std::int64_t count, const float* gates, std::int64_t gate_stride,
                        std::int64_t samples, std::int64_t n) {
    std::int64_t s = 0;
    for (; s + 4 <= samples; s += 4) {
        mix_of<4>(out + s * out_stride, out_stride, from + s * from_stride, from_stride, tau, count,
                  gates + s * gate_stride, gate_stride, n);
    }
    for (; s < samples; ++s) {
        mix_of<1>(out + s * out_stride, out_stride, from + s * from_stride, from_stride, tau, count,
                  gates + s * gate_stride, gate_stride, n);
    }
}

// to[c][r] = from[r][c] for 8 rows and 8 columns.
PM_ARCH inline void transpose_square(float* to, std::int64_t to_stride, const float* from, std::int64_t from_stride) {
    typedef float Eight __attribute__((vector_size(32)));
    typedef float EightLoose __attribute__((vector_size(32), aligned(4), may_alias));
    typedef int Places __attribute__((vector_size(32)));
    Eight a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const EightLoose*>(from + i * from_stride);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        b[i] = __builtin_shuffle(a[i], a[i + 1], Places{0, 8, 1, 9, 4, 12, 5, 13});
        b[i + 1] = __builtin_shuffle(a[i], a[i + 1], Places{2, 10, 3, 11, 6, 14, 7, 15});
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            a[i + 2 * j] = __builtin_shuffle(b[i + j], b[i + j + 2], Places{0, 1, 8, 9, 4, 5, 12, 13});
            a[i + 2 * j + 1] = __builtin_shuffle(b[i + j], b[i + j + 2], Places{2, 3, 10, 11, 6, 7, 14, 15});
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const Eight low = __builtin_shuffle(a[i], a[i + 4], Places{0, 1, 2, 3, 8, 9, 10, 11});
        const Eight high = __builtin_shuffle(a[i], a[i + 4], Places{4, 5, 6, 7, 12, 13, 14, 15});
        *reinterpret_cast<EightLoose*>(to + i * to_stride) = low;
        *reinterpret_cast<EightLoose*>(to + (i + 4) * to_stride) = high;
    }
}

// to[c][r] = from[r][c]. The last squares overlap the ones before them.
PM_ARCH inline void transpose(float* to, std::int64_t to_stride, const float* from, std::int64_t from_stride,
                              std::int64_t rows, std::int64_t columns) {
    if (rows < 8 || columns < 8) {
        for (std::int64_t c = 0; c < columns; ++c) {
            for (std::int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
        }
        return;
    }
    for (std::int64_t c = 0; c < columns; c += 8) {
        const std::int64_t column = std::min(c, columns - 8);
        for (std::int64_t r = 0; r < rows; r += 8) {
            const std::int64_t row = std::min(r, rows - 8);
            transpose_square(to + column * to_stride + row, to_stride, from + row * from_stride + column, from_stride);
        }
    }
}

// out[t] = sum_i a[i] b[t][i] over n elements, a multiple of 32: 32 sums in float32, added in float64.
PM_ARCH inline void dots(double* out, const float* a, const float* b, std::int64_t count, std::int64_t n) {
    constexpr std::int64_t parts = 32 / lanes;
    for (std::int64_t t = 0; t < count; ++t) {
        Vec sums[parts] = {};
        for (std::int64_t at = 0; at < n; at += 32) {
#pragma GCC unroll 4
            for (std::int64_t i = 0; i < parts; ++i) {
                sums[i] += read(a + at + i * lanes) * read(b + t * n + at + i * lanes);
            }
        }
        double total = 0.0;
        for (std::int64_t i = 0; i < 32; ++i) total += static_cast<double>(sums[i / lanes][i % lanes]);
        out[t] = total;
    }
}

inline TileKernels kernels() {
    const auto tiles = []<int... M>(std::integer_sequence<int, M...>) {
        return std::vector<TileKernels::Tile>{tile<M + 1>...};
    };
    return {static_cast<int>(lanes), width, tiles(std::make_integer_sequence<int, most_rows>{}), mix, transpose, dots};
}
