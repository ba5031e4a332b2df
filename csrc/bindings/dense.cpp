// Ops that sum weights and task vectors, and their statistics.
#include "bindings/arguments.h"
#include "common/finite.h"
#include "io/combine_files.h"
#include "io/part_digests.h"
#include "ops/combine.h"
#include "ops/combine_vectors.h"
#include "ops/low_rank_sum.h"
#include "ops/task_dots.h"
#include "ops/task_stats.h"
#include "ops/task_sum.h"
#include "ops/wudi_adam_step.h"

namespace pymerge {

static FileTensor file_tensor(int descriptor, std::int64_t offset, std::int32_t dtype) {
    return {descriptor, offset, checked_dtype(dtype)};
}

}  // namespace pymerge

template <>
struct pybind11::detail::type_caster<pymerge::FileTensor> : from_tuple<&pymerge::file_tensor> {};

namespace pymerge {
namespace {

void combine(const Output& out, const std::optional<MatrixView>& base, const std::vector<MatrixView>& tensors,
             const std::vector<double>& weights, double divisor, int threads) {
    check_one_each("combine", tensors, "weights", weights, "tensor");
    check_elements("combine", out.row_stride, base, tensors, "tensor");
    combine_cpu({out, or_none(base), tensors.data(), weights.data(), divisor, count(tensors), out.row_stride}, threads);
}

// (finite, which file failed, errno, byte, nanoseconds in reads), as in CombineFilesResult.
std::tuple<bool, std::int64_t, int, std::int64_t, std::int64_t> combine_files(
    const Output& out, const std::optional<FileTensor>& base, const std::vector<FileTensor>& tensors,
    const std::vector<double>& weights, double divisor, std::int64_t block, bool check_inputs) {
    PM_CHECK(tensors.size() == weights.size(),
             "combine_files: " << tensors.size() << " tensors, " << weights.size() << " weights; give one of each");
    const CombineFilesResult result =
        combine_files_cpu({out, base ? &*base : nullptr, tensors.data(), weights.data(), divisor,
                           static_cast<std::int64_t>(tensors.size()), out.row_stride, block, check_inputs});
    return {result.finite, result.failed, result.error, result.at, result.reading_ns};
}

void combine_vectors(const Output& out, const std::optional<MatrixView>& base, const std::vector<MatrixView>& tensors,
                     Address weights, bool by_columns, std::int64_t rows, std::int64_t columns, int threads) {
    PM_CHECK(out.row_stride == rows * columns,
             "combine_vectors: " << out.row_stride << " elements of output for " << rows << " x " << columns);
    check_elements("combine_vectors", out.row_stride, base, tensors, "tensor");
    combine_vectors_cpu(
        {out, or_none(base), tensors.data(), pointer<const double>(weights), by_columns, count(tensors), rows, columns},
        threads);
}

std::int64_t part_digests(Address digests, Address data, std::int64_t nbytes, std::int64_t part) {
    return part_digests_cpu({pointer<std::uint8_t>(digests), pointer<const std::uint8_t>(data), nbytes, part});
}

bool is_finite(const MatrixView& tensor) { return is_finite_cpu(tensor.data, tensor.dtype, tensor.row_stride); }

void low_rank_sum(const Output& out, const MatrixView& base, const MatrixView& left, const MatrixView& panels,
                  double scale, std::int64_t rows, std::int64_t columns, int threads) {
    const auto check = [&](const char* what, std::int64_t numel, std::int64_t wanted) {
        PM_CHECK(numel == wanted, "low_rank_sum: " << what << " has " << numel << " elements, not " << wanted);
    };
    check("the output", out.row_stride, rows * columns);
    check("the base", base.row_stride, rows * columns);
    const std::int64_t rank = rows > 0 ? left.row_stride / rows : 0;
    check("the left factor", left.row_stride, rows * rank);
    if (rows > 0) {
        const std::int64_t padded = (columns + panel_columns - 1) / panel_columns * panel_columns;
        check("the right factor", panels.row_stride, padded * rank);
    }
    low_rank_sum_cpu({out, base, left, panels, scale, rows, columns, rank}, threads);
}

void task_sum(const Output& out, const MatrixView& base, const std::vector<MatrixView>& experts,
              const std::vector<double>& weights, Address means, std::int64_t rows, std::int64_t columns, int threads) {
    check_one_each("task_sum", experts, "weights", weights);
    PM_CHECK(out.row_stride == columns,
             "task_sum: the output has row stride " << out.row_stride << " for " << columns << " columns, contiguous");
    task_sum_cpu({out, base, experts.data(), weights.data(), pointer<const void>(means), count(experts), rows, columns},
                 threads);
}

void task_stats(Address norms, Address traces, Address means, const MatrixView& base,
                const std::vector<MatrixView>& experts, std::int64_t rows, std::int64_t columns, int threads) {
    task_stats_cpu({pointer<double>(norms), pointer<double>(traces), pointer<float>(means), base, experts.data(),
                    count(experts), rows, columns},
                   threads);
}

void wudi_adam_step(const Output& D, const Output& m, const Output& v, const MatrixView& product, const MatrixView& B,
                    double beta1, double beta2, double correction1, double correction2, double lr, double eps,
                    int threads) {
    const auto check = [&](const char* what, DType dtype, std::int64_t numel) {
        check_dtype("wudi_adam_step", what, dtype, D.dtype);
        PM_CHECK(numel == D.row_stride,
                 "wudi_adam_step: " << what << " has " << numel << " elements, D " << D.row_stride);
    };
    check("m", m.dtype, m.row_stride);
    check("v", v.dtype, v.row_stride);
    check("the product", product.dtype, product.row_stride);
    check("B", B.dtype, B.row_stride);
    wudi_adam_step_cpu({D.data, m.data, v.data, product.data, B.data, D.dtype, D.row_stride, beta1, beta2, correction1,
                        correction2, lr, eps},
                       threads);
}

void task_dots(Address out, const std::optional<MatrixView>& base, const std::vector<MatrixView>& tensors,
               std::int64_t vectors, std::int64_t length, int threads) {
    check_elements("task_dots", vectors * length, base, tensors, "tensor");
    task_dots_cpu({pointer<double>(out), or_none(base), tensors.data(), count(tensors), vectors, length}, threads);
}

}  // namespace

void define_dense(py::module_& module) {
    module.def("combine", &combine, Unlocked());
    module.def("combine_files", &combine_files, Unlocked());
    module.def("combine_vectors", &combine_vectors, Unlocked());
    module.def("part_digests", &part_digests, Unlocked());
    module.def("is_finite", &is_finite, Unlocked());
    module.def("low_rank_sum", &low_rank_sum, Unlocked());
    module.def("task_sum", &task_sum, Unlocked());
    module.def("task_stats", &task_stats, Unlocked());
    module.def("wudi_adam_step", &wudi_adam_step, Unlocked());
    module.def("task_dots", &task_dots, Unlocked());
}

}  // namespace pymerge
