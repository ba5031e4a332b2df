// Small systems, a batch at a time. A block takes one system and up to `block_rows` rows of its R: it factorises
// S = L L^T in shared memory, then passes tiles of R through X = R L^-T L^-1. Blocks of one system each factorise it
// anew: n^3 / 3 operations, which is less than passing n rows costs, and nothing to wait for between kernels.
//
// Sums are double, of float32 systems too, and rounded once: in float32 the kernel erred more than a library, which
// adds in blocks. Substitution goes by panels of `panel` columns: what earlier columns contribute is a dot product for
// each element of the panel, all threads at once; the triangle inside the panel is left to one thread a row. So a tile
// waits twice a panel, not twice a column.
#include "ops/spd_solve.h"

#include <cmath>

#include "common/device.h"

namespace pymerge {
namespace {

constexpr int tile_rows = 8;
constexpr int panel = 16;
constexpr int threads = tile_rows * panel;
constexpr std::int64_t block_rows = 32 * tile_rows;

template <class A>
constexpr int most_columns = static_cast<int>(spd_solve_columns(sizeof(A) == 8 ? DType::f64 : DType::f32));

template <class A>
struct Arguments {
    A* X;
    A* conditions;
    std::int32_t* minors;
    const A* S;
    const A* R;
    const A* prior;
    const A* start;
    std::int64_t rows;
    int columns;
    int iterations;
};

// Where row i of a packed lower triangle starts.
PM_HOST_DEVICE int row_start(int i) { return i * (i + 1) / 2; }

// What one block shares. Rows of `tile` are right-hand sides on their way to solutions.
template <class A>
struct Shared {
    A L[most_columns<A> * (most_columns<A> + 1) / 2];
    A tile[tile_rows][most_columns<A>];
    A u[most_columns<A>];    // S^-1 1
    A row[most_columns<A>];  // c S^-1
    A along[tile_rows];      // R u / (1 + c u), of each row
};
static_assert(sizeof(Shared<float>) <= 48 * 1024 && sizeof(Shared<double>) <= 48 * 1024);

template <class F>
__device__ __forceinline__ void for_each_thread_item(int count, F&& f) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += threads) f(i);
}

// L of S = L L^T, column by column, in place of S's packed lower triangle. 0, or the size of the first leading minor
// that is not positive, the same in all threads.
template <class A>
__device__ int factorise(A* L, int n) {
    for (int j = 0; j < n; ++j) {
        for_each_thread_item(n - j, [&](int below) {
            const int i = j + below;
            double sum = L[row_start(i) + j];
            for (int k = 0; k < j; ++k) sum -= double(L[row_start(i) + k]) * double(L[row_start(j) + k]);
            L[row_start(i) + j] = static_cast<A>(sum);
        });
        __syncthreads();
        const A pivot = L[row_start(j) + j];
        if (!(pivot > A(0))) return j + 1;
        const A root = std::sqrt(pivot);
        __syncthreads();  // all have read the pivot
        for_each_thread_item(n - j, [&](int below) {
            A& element = L[row_start(j + below) + j];
            element = below == 0 ? root : element / root;
        });
        __syncthreads();
    }
    return 0;
}

// The tile's rows x become x L^-T L^-1.
template <class A>
__device__ void substitute(Shared<A>& s, int n) {
    const A* L = s.L;
    A* x = s.tile[static_cast<int>(threadIdx.x) / panel];
    const int lane = static_cast<int>(threadIdx.x) % panel;
    // x_j <- x_j - sum over k of x_k times L's element for (j, k)
    const auto subtract = [&](int j, int first, int end, auto&& element) {
        double sum = x[j];
        for (int k = first; k < end; ++k) sum -= double(x[k]) * double(element(k));
        x[j] = static_cast<A>(sum);
    };
    for (int first = 0; first < n; first += panel) {
        const int end = first + panel < n ? first + panel : n;
        const int j = first + lane;
        if (j < end) subtract(j, 0, first, [&](int k) { return L[row_start(j) + k]; });
        __syncthreads();
        for (int i = first; lane == 0 && i < end; ++i) {
            subtract(i, first, i, [&](int k) { return L[row_start(i) + k]; });
            x[i] /= L[row_start(i) + i];
        }
        __syncthreads();
    }
    for (int first = (n - 1) / panel * panel; first >= 0; first -= panel) {
        const int end = first + panel < n ? first + panel : n;
        const int j = first + lane;
        if (j < end) subtract(j, end, n, [&](int k) { return L[row_start(k) + j]; });
        __syncthreads();
        for (int i = end - 1; lane == 0 && i >= first; --i) {
            subtract(i, i + 1, end, [&](int k) { return L[row_start(k) + i]; });
            x[i] /= L[row_start(i) + i];
        }
        __syncthreads();
    }
}

// Divides v by its length and returns that; every thread adds the same squares in the same order.
template <class A>
__device__ A normalise(A* v, int n) {
    A sum = 0;
    for (int k = 0; k < n; ++k) sum += v[k] * v[k];
    const A length = std::sqrt(sum);
    __syncthreads();  // all have read v
    for_each_thread_item(n, [&](int k) { v[k] /= length; });
    __syncthreads();
    return length;
}

// cond_2(S) from below, by power iterations on S = L L^T (u, by way of row) and on S^-1 (the first row of the tile).
template <class A>
__device__ A condition(Shared<A>& s, const Arguments<A>& a) {
    const int n = a.columns;
    for_each_thread_item(n, [&](int k) {
        s.u[k] = a.start[k];
        for (int r = 0; r < tile_rows; ++r) s.tile[r][k] = a.start[k];
    });
    __syncthreads();
    A largest = 1, smallest_inverse = 1;
    for (int iteration = 0; iteration < a.iterations; ++iteration) {
        for_each_thread_item(n, [&](int k) {
            A sum = 0;
            for (int i = k; i < n; ++i) sum += s.L[row_start(i) + k] * s.u[i];
            s.row[k] = sum;
        });
        __syncthreads();
        for_each_thread_item(n, [&](int i) {
            A sum = 0;
            for (int k = 0; k <= i; ++k) sum += s.L[row_start(i) + k] * s.row[k];
            s.u[i] = sum;
        });
        __syncthreads();
        largest = normalise(s.u, n);
        substitute(s, n);
        smallest_inverse = normalise(s.tile[0], n);
    }
    return largest * smallest_inverse;
}

template <class A>
__global__ void __launch_bounds__(threads) spd_solve_kernel(const __grid_constant__ Arguments<A> a) {
    __shared__ Shared<A> s;
    const int n = a.columns;
    const std::int64_t layer = blockIdx.y;
    const bool reports = blockIdx.x == 0;  // of the blocks of one system
    const A* S = a.S + layer * n * n;
    for (int i = 0; i < n; ++i) {
        for_each_thread_item(i + 1, [&](int k) { s.L[row_start(i) + k] = S[static_cast<std::int64_t>(i) * n + k]; });
    }
    __syncthreads();
    const int minor = factorise(s.L, n);
    if (reports && threadIdx.x == 0) a.minors[layer] = minor;
    if (minor != 0) return;
    if (reports) {
        const A estimate = condition(s, a);
        if (threadIdx.x == 0) a.conditions[layer] = estimate;
    }

    const A* prior = a.prior == nullptr ? nullptr : a.prior + layer * n;
    double denominator = 1;
    if (prior != nullptr) {
        for_each_thread_item(n, [&](int k) {
            for (int r = 0; r < tile_rows; ++r) s.tile[r][k] = r == 0 ? A(1) : prior[k];
        });
        __syncthreads();
        substitute(s, n);
        for_each_thread_item(n, [&](int k) {
            s.u[k] = s.tile[0][k];
            s.row[k] = s.tile[1][k];
        });
        __syncthreads();
        for (int k = 0; k < n; ++k) denominator += double(prior[k]) * double(s.u[k]);
    }

    const std::int64_t stop = (blockIdx.x + 1) * block_rows < a.rows ? (blockIdx.x + 1) * block_rows : a.rows;
    for (std::int64_t start = blockIdx.x * block_rows; start < stop; start += tile_rows) {
        const std::int64_t offset = (layer * a.rows + start) * n;
        const int height = stop - start < tile_rows ? static_cast<int>(stop - start) : tile_rows;
        for_each_thread_item(tile_rows * n,
                             [&](int i) { s.tile[i / n][i % n] = i < height * n ? a.R[offset + i] : A(0); });
        __syncthreads();
        if (prior != nullptr && threadIdx.x % panel == 0) {
            const int r = static_cast<int>(threadIdx.x) / panel;
            double sum = 0;
            for (int k = 0; k < n; ++k) sum += double(s.tile[r][k]) * double(s.u[k]);
            s.along[r] = static_cast<A>(sum / denominator);
        }
        __syncthreads();
        substitute(s, n);
        for_each_thread_item(height * n, [&](int i) {
            const A y = s.tile[i / n][i % n];
            a.X[offset + i] = prior == nullptr ? y : y - s.along[i / n] * s.row[i % n];
        });
        __syncthreads();
    }
}

template <class A>
void launch(const SpdSolveParams& p, cudaStream_t on) {
    const auto in = [](const void* data) { return static_cast<const A*>(data); };
    const Arguments<A> a{static_cast<A*>(p.X),
                         static_cast<A*>(p.conditions),
                         p.minors,
                         in(p.S),
                         in(p.R),
                         in(p.prior),
                         in(p.start),
                         p.rows,
                         static_cast<int>(p.columns),
                         p.iterations};
    const std::int64_t needed = (p.rows + block_rows - 1) / block_rows;
    const dim3 grid(static_cast<unsigned>(needed > 0 ? needed : 1), static_cast<unsigned>(p.layers));
    spd_solve_kernel<A><<<grid, threads, 0, on>>>(a);
    PM_CUDA_CHECK(cudaGetLastError());
}

}  // namespace

void spd_solve_cuda(const SpdSolveParams& p, void* stream) {
    PM_CHECK(p.dtype == DType::f32 || p.dtype == DType::f64, "spd_solve: systems must be float32 or float64");
    PM_CHECK(p.rows >= 0 && p.columns >= 0 && p.layers >= 0,
             "spd_solve: " << p.layers << " systems of " << p.rows << " x " << p.columns << " elements");
    const std::int64_t most = spd_solve_columns(p.dtype);
    PM_CHECK(p.columns <= most,
             "spd_solve: " << p.columns << " columns; shared memory holds " << most << ", use the library");
    PM_CHECK(p.layers < 65536, "spd_solve: " << p.layers << " systems; one launch takes 65535, split the batch");
    if (p.layers == 0 || p.columns == 0) return;
    const auto on = static_cast<cudaStream_t>(stream);
    if (p.dtype == DType::f64) {
        launch<double>(p, on);
    } else {
        launch<float>(p, on);
    }
}

}  // namespace pymerge
