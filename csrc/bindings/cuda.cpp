// pymerge._cuda: the functions for NVIDIA devices.
#include "bindings/arguments.h"
#include "ops/spd_solve.h"
#include "ops/task_gram.h"
#include "ops/trim_threshold.h"
#include "ops/wudi_adam.h"

namespace pymerge {
namespace {

using pymerge::view;  // which the overloads below would hide

void combine(Address out, std::int32_t out_dtype, Address base, std::int32_t base_dtype,
             const std::vector<Address>& inputs, const std::vector<std::int32_t>& dtypes,
             const std::vector<double>& weights, double divisor, std::int64_t numel, std::intptr_t stream) {
    with_combine(out, out_dtype, base, base_dtype, inputs, dtypes, weights, divisor, numel,
                 [&](const CombineParams& p) { combine_cuda(p, reinterpret_cast<void*>(stream)); });
}

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

void define(py::module_& module) {
    module.doc() = "Compiled ops for NVIDIA devices; see pymerge.backends.cuda.";
    module.def("combine", &combine, Unlocked());
    module.def("task_gram", &task_gram, Unlocked());
    module.def("wudi_adam", &wudi_adam, Unlocked());
    module.def("spd_solve", &spd_solve, Unlocked());
    module.def("trim_threshold", &trim_threshold, Unlocked());
    module.def("trim_threshold_scratch", &trim_threshold_scratch);
    module.def("spd_solve_columns", [](std::int32_t dtype) { return spd_solve_columns(checked_dtype(dtype)); });
    module.def("build_info", [] { return build_info("CUDA architectures " PM_CUDA_ARCHS); });
}

}  // namespace
}  // namespace pymerge

PYBIND11_MODULE(_cuda, module) { pymerge::define(module); }
