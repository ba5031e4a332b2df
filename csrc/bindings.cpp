// The Python face of the compiled ops, and the only file that includes pybind11. Built twice: pymerge._C holds the CPU
// functions, pymerge._cuda (PM_CUDA) those for NVIDIA devices. Pointers, streams and dtypes come as integers; Python
// has checked devices, shapes, contiguity and overlap, and owns every buffer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "common/dispatch.h"
#include "ops/adam_step.h"
#include "ops/combine.h"
#include "ops/combine_files.h"
#include "ops/elementwise.h"
#include "ops/magnitude_counts.h"
#include "ops/magnitude_mask.h"
#include "ops/mix_weights.h"
#include "ops/random_mask.h"
#include "ops/routed_linear.h"
#include "ops/sparse_combine.h"
#include "ops/spd_solve.h"
#include "ops/task_dots.h"
#include "ops/task_gram.h"
#include "ops/task_vector.h"
#include "ops/trim_threshold.h"
#include "ops/wudi_adam.h"

namespace py = pybind11;
using namespace pymerge;

namespace {

using Address = std::uintptr_t;
using Matrix = std::tuple<Address, std::int32_t, std::int64_t>;  // address, dtype code, row stride

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

MatrixView view(const Matrix& m) {
    return {pointer<const void>(std::get<0>(m)), checked_dtype(std::get<1>(m)), std::get<2>(m)};
}

std::vector<MatrixView> views(const std::vector<Matrix>& matrices) {
    std::vector<MatrixView> result;
    for (const Matrix& m : matrices) result.push_back(view(m));
    return result;
}

void combine(Address out, std::int32_t out_dtype, Address base, std::int32_t base_dtype,
             const std::vector<Address>& inputs, const std::vector<std::int32_t>& dtypes,
             const std::vector<double>& weights, double divisor, std::int64_t numel,
             std::intptr_t threads_or_stream) {
    PM_CHECK(inputs.size() == dtypes.size() && inputs.size() == weights.size(),
             "combine: " << inputs.size() << " inputs, " << dtypes.size() << " dtypes, " << weights.size()
                         << " weights; give one of each");
    std::vector<const void*> pointers;
    std::vector<DType> codes;
    for (std::size_t t = 0; t < inputs.size(); ++t) {
        pointers.push_back(pointer<const void>(inputs[t]));
        codes.push_back(checked_dtype(dtypes[t]));
    }
    const CombineParams p{pointer(out),     checked_dtype(out_dtype), pointer<const void>(base), checked_dtype(base_dtype),
                          pointers.data(),  codes.data(),             weights.data(),
                          divisor,
                          static_cast<std::int64_t>(inputs.size()), numel};
#if defined(PM_CUDA)
    combine_cuda(p, reinterpret_cast<void*>(threads_or_stream));
#else
    combine_cpu(p, static_cast<int>(threads_or_stream));
#endif
}

#if defined(PM_CUDA)

using Layers = std::tuple<Address, std::int32_t, std::int64_t, std::int64_t>;  // a matrix, and the layers' stride

LayersView view(const Layers& l) {
    return {view(Matrix{std::get<0>(l), std::get<1>(l), std::get<2>(l)}), std::get<3>(l)};
}

void task_gram(Address out, const Layers& base, const std::vector<Layers>& experts, Address weights, Address means,
               std::int64_t layers, std::int64_t rows, std::int64_t columns, std::intptr_t stream) {
    std::vector<LayersView> matrices;
    for (const Layers& expert : experts) matrices.push_back(view(expert));
    task_gram_cuda({pointer<float>(out), view(base), matrices.data(), pointer<const float>(weights),
                    pointer<const float>(means), static_cast<std::int64_t>(experts.size()), layers, rows, columns},
                   reinterpret_cast<void*>(stream));
}

void wudi_adam(Address D, Address other, Address m, Address v, Address A, Address B, Address lr, std::int64_t layers,
               std::int64_t rows, std::int64_t columns, std::int64_t iterations, double beta1, double beta2, double eps,
               std::intptr_t stream) {
    wudi_adam_cuda({pointer<float>(D), pointer<float>(other), pointer<float>(m), pointer<float>(v),
                    pointer<const float>(A), pointer<const float>(B), pointer<const double>(lr), layers, rows, columns,
                    iterations, beta1, beta2, eps},
                   reinterpret_cast<void*>(stream));
}

void spd_solve(Address X, Address conditions, Address minors, Address S, Address R, Address prior, Address start,
               std::int32_t dtype, std::int64_t layers, std::int64_t rows, std::int64_t columns, int iterations,
               std::intptr_t stream) {
    spd_solve_cuda({pointer(X), pointer(conditions), pointer<std::int32_t>(minors), pointer<const void>(S),
                    pointer<const void>(R), pointer<const void>(prior), pointer<const void>(start),
                    checked_dtype(dtype), layers, rows, columns, iterations},
                   reinterpret_cast<void*>(stream));
}

void trim_threshold(Address keys, Address ends, Address scratch, const Matrix& base, const std::vector<Matrix>& experts,
                    const std::vector<std::int64_t>& counts, std::int64_t numel, std::intptr_t stream) {
    PM_CHECK(experts.size() == counts.size(),
             "trim_threshold: " << experts.size() << " experts, " << counts.size() << " counts; give one of each");
    const std::vector<MatrixView> matrices = views(experts);
    trim_threshold_cuda({pointer<std::int64_t>(keys), pointer<std::int64_t>(ends), view(base), matrices.data(),
                         counts.data(), static_cast<std::int64_t>(experts.size()), numel},
                        pointer(scratch), reinterpret_cast<void*>(stream));
}

#else

using File = std::tuple<int, std::int64_t, std::int32_t>;  // descriptor, byte of its first element, dtype code

FileTensor view(const File& f) { return {std::get<0>(f), std::get<1>(f), checked_dtype(std::get<2>(f))}; }

// (finite, which file failed, errno, byte, nanoseconds in reads), as in CombineFilesResult.
std::tuple<bool, std::int64_t, int, std::int64_t, std::int64_t> combine_files(
    Address out, std::int32_t out_dtype, const std::optional<File>& base, const std::vector<File>& inputs,
    const std::vector<double>& weights, double divisor, std::int64_t numel, std::int64_t block, bool check_inputs) {
    PM_CHECK(inputs.size() == weights.size(),
             "combine_files: " << inputs.size() << " inputs, " << weights.size() << " weights; give one of each");
    const FileTensor origin = base ? view(*base) : FileTensor{};
    std::vector<FileTensor> files;
    for (const File& input : inputs) files.push_back(view(input));
    const CombineFilesResult result = combine_files_cpu(
        {pointer(out), checked_dtype(out_dtype), base ? &origin : nullptr, files.data(), weights.data(), divisor,
         static_cast<std::int64_t>(files.size()), numel, block, check_inputs});
    return {result.finite, result.failed, result.error, result.at, result.reading_ns};
}

bool is_finite(Address values, std::int32_t dtype, std::int64_t numel) {
    return is_finite_cpu(pointer<const void>(values), checked_dtype(dtype), numel);
}

void task_sum(Address out, std::int32_t dtype, const Matrix& base, const std::vector<Matrix>& experts,
              const std::vector<double>& weights, Address means, std::int64_t rows, std::int64_t columns, int threads) {
    PM_CHECK(experts.size() == weights.size(),
             "task_sum: " << experts.size() << " experts, " << weights.size() << " weights; give one of each");
    const std::vector<MatrixView> matrices = views(experts);
    task_sum_cpu({pointer(out), checked_dtype(dtype), view(base), matrices.data(), weights.data(),
                  pointer<const void>(means), static_cast<std::int64_t>(experts.size()), rows, columns},
                 threads);
}

void task_stats(Address norms, Address traces, Address means, const Matrix& base, const std::vector<Matrix>& experts,
                std::int64_t rows, std::int64_t columns, int threads) {
    const std::vector<MatrixView> matrices = views(experts);
    task_stats_cpu({pointer<double>(norms), pointer<double>(traces), pointer<float>(means), view(base), matrices.data(),
                    static_cast<std::int64_t>(experts.size()), rows, columns},
                   threads);
}

void trim_threshold(Address keys, Address ends, const Matrix& base, const std::vector<Matrix>& experts,
                    const std::vector<std::int64_t>& counts, std::int64_t numel, int threads) {
    PM_CHECK(experts.size() == counts.size(),
             "trim_threshold: " << experts.size() << " experts, " << counts.size() << " counts; give one of each");
    const std::vector<MatrixView> matrices = views(experts);
    trim_threshold_cpu({pointer<std::int64_t>(keys), pointer<std::int64_t>(ends), view(base), matrices.data(),
                        counts.data(), static_cast<std::int64_t>(experts.size()), numel},
                       threads);
}

void magnitude_counts(Address counts, const Matrix& base, const std::vector<Matrix>& experts,
                      const std::vector<std::uint32_t>& prefixes, int shift, int bits, std::int64_t numel,
                      int threads) {
    PM_CHECK(experts.size() == prefixes.size(),
             "magnitude_counts: " << experts.size() << " experts, " << prefixes.size() << " prefixes; give one of each");
    const std::vector<MatrixView> matrices = views(experts);
    magnitude_counts_cpu({pointer<std::int64_t>(counts), view(base), matrices.data(), prefixes.data(), shift, bits,
                          static_cast<std::int64_t>(experts.size()), numel},
                         threads);
}

std::int64_t magnitude_place(const Matrix& base, const Matrix& expert, std::uint32_t key, std::int64_t left,
                             std::int64_t numel) {
    return magnitude_place_cpu(view(base), view(expert), key, left, numel);
}

using Masks = std::tuple<Address, Address, Address>;  // bits, L1 norms before, after
using Selected = std::tuple<Address, Address>;        // keys, ends; 0 and 0: nothing

MaskOutput view(const Masks& m) {
    return {pointer<std::uint8_t>(std::get<0>(m)), pointer<double>(std::get<1>(m)), pointer<double>(std::get<2>(m))};
}

Selection view(const Selected& s) {
    return {pointer<const std::int64_t>(std::get<0>(s)), pointer<const std::int64_t>(std::get<1>(s))};
}

void magnitude_mask(const Masks& out, const Matrix& base, const std::vector<Matrix>& experts, const Selected& kept,
                    const Selected& dropped, std::int64_t numel, int threads) {
    const std::vector<MatrixView> matrices = views(experts);
    magnitude_mask_cpu({view(out), view(base), matrices.data(), view(kept), view(dropped),
                        static_cast<std::int64_t>(experts.size()), numel},
                       threads);
}

void random_mask(const Masks& out, const Matrix& base, const std::vector<Matrix>& experts,
                 const std::vector<double>& lowest, const std::vector<double>& highest,
                 const std::vector<std::uint64_t>& keys, std::int64_t first, std::int64_t rows, std::int64_t columns,
                 int threads) {
    PM_CHECK(experts.size() == lowest.size() && experts.size() == highest.size() && experts.size() == keys.size(),
             "random_mask: " << experts.size() << " experts, " << lowest.size() << " and " << highest.size()
                             << " probabilities, " << keys.size() << " keys; give one of each");
    const std::vector<MatrixView> matrices = views(experts);
    random_mask_cpu({view(out), view(base), matrices.data(), lowest.data(), highest.data(), keys.data(),
                     static_cast<std::int64_t>(experts.size()), first, rows, columns},
                    threads);
}

void sparse_combine(Address out, std::int32_t out_dtype, const Matrix& base, const std::vector<Matrix>& experts,
                    Address bits, const std::vector<double>& sizes, const std::vector<double>& weights,
                    std::int64_t numel, bool elect, bool normalize, double scale, int threads) {
    PM_CHECK(experts.size() == sizes.size() && experts.size() == weights.size(),
             "sparse_combine: " << experts.size() << " experts, " << sizes.size() << " sizes, " << weights.size()
                                << " weights; give one of each");
    const std::vector<MatrixView> matrices = views(experts);
    sparse_combine_cpu({pointer(out), checked_dtype(out_dtype), view(base), matrices.data(),
                        pointer<const std::uint8_t>(bits), sizes.data(), weights.data(),
                        static_cast<std::int64_t>(experts.size()), numel, elect, normalize, scale},
                       threads);
}

void adam_step(Address D, Address m, Address v, Address product, Address B, std::int32_t dtype, std::int64_t numel,
               double beta1, double beta2, double correction1, double correction2, double lr, double eps, int threads) {
    adam_step_cpu({pointer(D), pointer(m), pointer(v), pointer<const void>(product), pointer<const void>(B),
                   checked_dtype(dtype), numel, beta1, beta2, correction1, correction2, lr, eps},
                  threads);
}

void task_dots(Address out, Address base, std::int32_t base_dtype, const std::vector<Address>& inputs,
               const std::vector<std::int32_t>& dtypes, std::int64_t vectors, std::int64_t length, int threads) {
    PM_CHECK(inputs.size() == dtypes.size(),
             "task_dots: " << inputs.size() << " inputs, " << dtypes.size() << " dtypes; give one of each");
    std::vector<const void*> pointers;
    std::vector<DType> codes;
    for (std::size_t t = 0; t < inputs.size(); ++t) {
        pointers.push_back(pointer<const void>(inputs[t]));
        codes.push_back(checked_dtype(dtypes[t]));
    }
    task_dots_cpu({pointer<double>(out), pointer<const void>(base), checked_dtype(base_dtype), pointers.data(),
                   codes.data(), static_cast<std::int64_t>(inputs.size()), vectors, length},
                  threads);
}

// base, its dtype, experts, their dtypes, elements
using Tasks = std::tuple<Address, std::int32_t, std::vector<Address>, std::vector<std::int32_t>, std::int64_t>;
using Target = std::tuple<Address, std::int32_t>;

// Calls f(TaskTensors); what the struct points to lives until f returns.
template <class F>
void with_tasks(const Tasks& tasks, F&& f) {
    const auto& [base, base_dtype, experts, dtypes, numel] = tasks;
    PM_CHECK(experts.size() == dtypes.size(),
             "task tensors: " << experts.size() << " experts, " << dtypes.size() << " dtypes; give one of each");
    std::vector<const void*> pointers;
    std::vector<DType> codes;
    for (std::size_t t = 0; t < experts.size(); ++t) {
        pointers.push_back(pointer<const void>(experts[t]));
        codes.push_back(checked_dtype(dtypes[t]));
    }
    f(TaskTensors{pointer<const void>(base), checked_dtype(base_dtype), pointers.data(), codes.data(),
                  static_cast<std::int64_t>(experts.size()), numel});
}

Output output(const Target& target) { return {pointer(std::get<0>(target)), checked_dtype(std::get<1>(target))}; }

void nearswap(const Target& out, const Tasks& tasks, double t, double least, int threads) {
    with_tasks(tasks, [&](const TaskTensors& p) { nearswap_cpu(output(out), p, t, least, threads); });
}

void ram(const Target& out, const Tasks& tasks, double epsilon, const std::vector<double>& factors, int threads) {
    with_tasks(tasks, [&](const TaskTensors& p) {
        PM_CHECK(factors.empty() || static_cast<std::int64_t>(factors.size()) == p.count,
                 "ram: " << factors.size() << " factors for " << p.count << " experts; give one of each, or none");
        ram_cpu(output(out), p, epsilon, factors.empty() ? nullptr : factors.data(), threads);
    });
}

void ram_counts(Address counts, const Tasks& tasks, double epsilon, int threads) {
    with_tasks(tasks,
               [&](const TaskTensors& p) { ram_counts_cpu(pointer<std::int64_t>(counts), p, epsilon, threads); });
}

void sce_spread(Address out, const Tasks& tasks, int threads) {
    with_tasks(tasks, [&](const TaskTensors& p) { sce_spread_cpu(pointer(out), p, threads); });
}

void sce_energies(Address energies, const Tasks& tasks, Address selected, int threads) {
    with_tasks(tasks, [&](const TaskTensors& p) {
        sce_energies_cpu(pointer<double>(energies), p, pointer<const bool>(selected), threads);
    });
}

void sce(const Target& out, const Tasks& tasks, Address selected, const std::vector<double>& weights, double least,
         int threads) {
    with_tasks(tasks, [&](const TaskTensors& p) {
        PM_CHECK(static_cast<std::int64_t>(weights.size()) == p.count,
                 "sce: " << weights.size() << " weights for " << p.count << " experts; give one of each");
        sce_cpu(output(out), p, pointer<const bool>(selected), weights.data(), least, threads);
    });
}

using Dense = std::tuple<Address, std::int32_t, std::int64_t, std::int64_t>;  // address, dtype, stride, T
// values, their dtype, columns, whether those are int32, starts, their stride, T
using Sparse = std::tuple<Address, std::int32_t, Address, bool, Address, std::int64_t, std::int64_t>;

DenseTasks view(const Dense& d) {
    return {pointer<const void>(std::get<0>(d)), checked_dtype(std::get<1>(d)), std::get<2>(d), std::get<3>(d)};
}

SparseTasks view(const Sparse& s) {
    return {pointer<const void>(std::get<0>(s)), checked_dtype(std::get<1>(s)),  pointer<const void>(std::get<2>(s)),
            std::get<3>(s),                      pointer<const std::int64_t>(std::get<4>(s)), std::get<5>(s),
            std::get<6>(s)};
}

MixParams mix_params(Address out, std::int32_t out_dtype, Address base, std::int32_t base_dtype, Address gates,
                     std::int64_t samples, std::int64_t rows, std::int64_t columns) {
    return {pointer(out), checked_dtype(out_dtype), pointer<const void>(base), checked_dtype(base_dtype),
            pointer<const float>(gates), samples, rows, columns};
}

void mix_dense(Address out, std::int32_t out_dtype, Address base, std::int32_t base_dtype, Address gates,
               const Dense& tasks, std::int64_t samples, std::int64_t rows, std::int64_t columns, int threads) {
    mix_dense_cpu(mix_params(out, out_dtype, base, base_dtype, gates, samples, rows, columns), view(tasks), threads);
}

void mix_sparse(Address out, std::int32_t out_dtype, Address base, std::int32_t base_dtype, Address gates,
                const Sparse& tasks, std::int64_t samples, std::int64_t rows, std::int64_t columns, int threads) {
    mix_sparse_cpu(mix_params(out, out_dtype, base, base_dtype, gates, samples, rows, columns), view(tasks), threads);
}

void dots_dense(Address out, Address delta, std::int64_t numel, const Dense& tasks, int threads) {
    dots_dense_cpu(pointer<double>(out), pointer<const float>(delta), numel, view(tasks), threads);
}

void dots_sparse(Address out, Address delta, std::int64_t rows, std::int64_t columns, const Sparse& tasks,
                 int threads) {
    dots_sparse_cpu(pointer<double>(out), pointer<const float>(delta), rows, columns, view(tasks), threads);
}

void add_sparse_products(Address y, std::int64_t y_stride, Address x, Address gates, std::int64_t tokens,
                         std::int64_t rows, std::int64_t columns, const Sparse& tasks, int threads) {
    add_sparse_products_cpu(pointer<float>(y), y_stride, pointer<const float>(x), pointer<const float>(gates), tokens,
                            rows, columns, view(tasks), threads);
}

using Weight = std::tuple<Address, std::int32_t, std::int64_t, std::int64_t>;  // address, dtype, rows, columns

// Calls f with W_0 and its task vectors.
template <class F>
void with_weight(const Weight& w, const std::variant<Dense, Sparse>& tasks, F&& f) {
    RoutedWeight weight{pointer<const void>(std::get<0>(w)), checked_dtype(std::get<1>(w)), std::get<2>(w),
                        std::get<3>(w), nullptr, nullptr, 0};
    std::visit([&](const auto& found) {
        const auto viewed = view(found);
        if constexpr (std::is_same_v<decltype(viewed), const DenseTasks>) {
            weight.dense = &viewed;
        } else {
            weight.sparse = &viewed;
        }
        weight.count = viewed.count;
        f(weight);
    }, tasks);
}

void routed_product(Address y, Address x, const std::vector<std::int64_t>& ends, Address gates, Address bias,
                    bool transposed, const Weight& weight, const std::variant<Dense, Sparse>& tasks, int lanes,
                    int threads) {
    with_weight(weight, tasks, [&](const RoutedWeight& w) {
        routed_product_cpu({pointer<float>(y), pointer<const float>(x), ends.data(), pointer<const float>(gates),
                            pointer<const float>(bias), static_cast<std::int64_t>(ends.size()) - 1, transposed, w},
                           lanes, threads);
    });
}

void routed_gates(Address out, Address dy, Address x, const std::vector<std::int64_t>& ends, const Weight& weight,
                  const std::variant<Dense, Sparse>& tasks, int lanes, int threads) {
    with_weight(weight, tasks, [&](const RoutedWeight& w) {
        routed_gates_cpu({pointer<double>(out), pointer<const float>(dy), pointer<const float>(x), ends.data(),
                          static_cast<std::int64_t>(ends.size()) - 1, w},
                         lanes, threads);
    });
}

#endif

std::string build_info() {
    std::string text = "C++" + std::to_string(__cplusplus / 100 % 100);
#if defined(__VERSION__)
    text += ", compiler " __VERSION__;
#endif
#if defined(PM_CUDA)
    text += ", CUDA architectures " PM_CUDA_ARCHS;
#elif defined(_OPENMP)
    text += ", OpenMP";
#else
    text += ", no OpenMP (one thread)";
#endif
    return text;
}

}  // namespace

#if defined(PM_CUDA)
PYBIND11_MODULE(_cuda, module) {
    module.doc() = "Compiled ops for NVIDIA devices; see pymerge.backends.cuda.";
    module.def("task_gram", &task_gram, py::call_guard<py::gil_scoped_release>());
    module.def("wudi_adam", &wudi_adam, py::call_guard<py::gil_scoped_release>());
    module.def("spd_solve", &spd_solve, py::call_guard<py::gil_scoped_release>());
    module.def("trim_threshold", &trim_threshold, py::call_guard<py::gil_scoped_release>());
    module.def("trim_threshold_scratch", &trim_threshold_scratch);
    module.def("spd_solve_columns", [](std::int32_t dtype) { return spd_solve_columns(checked_dtype(dtype)); });
#else
PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled ops for the CPU; see pymerge.backends.native.";
    module.def("combine_files", &combine_files, py::call_guard<py::gil_scoped_release>());
    module.def("is_finite", &is_finite, py::call_guard<py::gil_scoped_release>());
    module.def("task_sum", &task_sum, py::call_guard<py::gil_scoped_release>());
    module.def("task_stats", &task_stats, py::call_guard<py::gil_scoped_release>());
    module.def("trim_threshold", &trim_threshold, py::call_guard<py::gil_scoped_release>());
    module.def("magnitude_counts", &magnitude_counts, py::call_guard<py::gil_scoped_release>());
    module.def("magnitude_place", &magnitude_place, py::call_guard<py::gil_scoped_release>());
    module.def("magnitude_mask", &magnitude_mask, py::call_guard<py::gil_scoped_release>());
    module.def("random_mask", &random_mask, py::call_guard<py::gil_scoped_release>());
    module.def("sparse_combine", &sparse_combine, py::call_guard<py::gil_scoped_release>());
    module.def("task_dots", &task_dots, py::call_guard<py::gil_scoped_release>());
    module.def("nearswap", &nearswap, py::call_guard<py::gil_scoped_release>());
    module.def("ram", &ram, py::call_guard<py::gil_scoped_release>());
    module.def("ram_counts", &ram_counts, py::call_guard<py::gil_scoped_release>());
    module.def("sce_spread", &sce_spread, py::call_guard<py::gil_scoped_release>());
    module.def("sce_energies", &sce_energies, py::call_guard<py::gil_scoped_release>());
    module.def("sce", &sce, py::call_guard<py::gil_scoped_release>());
    module.def("adam_step", &adam_step, py::call_guard<py::gil_scoped_release>());
    module.def("mix_dense", &mix_dense, py::call_guard<py::gil_scoped_release>());
    module.def("mix_sparse", &mix_sparse, py::call_guard<py::gil_scoped_release>());
    module.def("dots_dense", &dots_dense, py::call_guard<py::gil_scoped_release>());
    module.def("dots_sparse", &dots_sparse, py::call_guard<py::gil_scoped_release>());
    module.def("add_sparse_products", &add_sparse_products, py::call_guard<py::gil_scoped_release>());
    module.def("routed_product", &routed_product, py::call_guard<py::gil_scoped_release>());
    module.def("routed_gates", &routed_gates, py::call_guard<py::gil_scoped_release>());
    module.def("routed_lanes", &routed_lanes);
#endif
    module.def("combine", &combine, py::call_guard<py::gil_scoped_release>());
    module.def("build_info", &build_info);
}
