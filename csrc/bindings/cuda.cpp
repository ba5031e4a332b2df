// pymerge._cuda: the functions for NVIDIA devices.
#include "bindings/arguments.h"
#include "bindings/combining.h"
#include "ops/spd_solve.h"
#include "ops/task_gram.h"
#include "ops/trim_threshold.h"
#include "ops/wudi_adam.h"

namespace pymerge {

static LayersView layers_view(Address address, std::int32_t dtype, std::int64_t row_stride, std::int64_t layer_stride) {
    return {matrix_view(address, dtype, row_stride), layer_stride};
}

}  // namespace pymerge

// The matrices of a batch: a matrix, and how many elements lie between two of them.
template <>
struct pybind11::detail::type_caster<pymerge::LayersView> : from_tuple<&pymerge::layers_view> {};

namespace pymerge {
namespace {

void combine(const Output& out, const std::optional<MatrixView>& base, const std::vector<MatrixView>& tensors,
             const std::vector<double>& weights, double divisor, Address stream) {
    combine_cuda(combine_params(out, base, tensors, weights, divisor), pointer(stream));
}

void task_gram(Address out, const LayersView& base, const std::vector<LayersView>& experts, Address weights,
               Address means, std::int64_t layers, std::int64_t rows, std::int64_t columns, Address stream) {
    task_gram_cuda({pointer<float>(out), base, experts.data(), pointer<const float>(weights),
                    pointer<const float>(means), static_cast<std::int64_t>(experts.size()), layers, rows, columns},
                   pointer(stream));
}

void wudi_adam(Address D, Address other, Address m, Address v, Address A, Address B, Address lr, std::int64_t layers,
               std::int64_t rows, std::int64_t columns, std::int64_t iterations, double beta1, double beta2, double eps,
               Address stream) {
    wudi_adam_cuda({pointer<float>(D), pointer<float>(other), pointer<float>(m), pointer<float>(v),
                    pointer<const float>(A), pointer<const float>(B), pointer<const double>(lr), layers, rows, columns,
                    iterations, beta1, beta2, eps},
                   pointer(stream));
}

void spd_solve(const Output& X, Address conditions, Address minors, const MatrixView& S, const MatrixView& R,
               const std::optional<MatrixView>& prior, const MatrixView& start, std::int64_t layers, std::int64_t rows,
               std::int64_t columns, int iterations, Address stream) {
    const auto check = [&](const char* what, DType dtype, std::int64_t numel, std::int64_t wanted) {
        check_dtype("spd_solve", what, dtype, X.dtype);
        PM_CHECK(numel == wanted, "spd_solve: " << what << " has " << numel << " elements, not " << wanted);
    };
    check("X", X.dtype, X.row_stride, layers * rows * columns);
    check("S", S.dtype, S.row_stride, layers * columns * columns);
    check("R", R.dtype, R.row_stride, layers * rows * columns);
    if (prior) check("the prior", prior->dtype, prior->row_stride, layers * columns);
    check("the start", start.dtype, start.row_stride, columns);
    spd_solve_cuda({X.data, pointer(conditions), pointer<std::int32_t>(minors), S.data, R.data, or_none(prior).data,
                    start.data, X.dtype, layers, rows, columns, iterations},
                   pointer(stream));
}

void trim_threshold(Address keys, Address ends, Address scratch, const MatrixView& base,
                    const std::vector<MatrixView>& experts, const std::vector<std::int64_t>& counts, Address stream) {
    check_one_each("trim_threshold", experts, "counts", counts);
    trim_threshold_cuda({pointer<std::int64_t>(keys), pointer<std::int64_t>(ends), base, experts.data(), counts.data(),
                         count(experts), common_elements("trim_threshold", base, experts)},
                        pointer(scratch), pointer(stream));
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
