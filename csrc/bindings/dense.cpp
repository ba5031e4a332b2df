// Ops that sum weights and task vectors, and their statistics.
#include <optional>

#include "bindings/arguments.h"
#include "ops/adam_step.h"
#include "ops/combine_files.h"
#include "ops/task_dots.h"

namespace pymerge {
namespace {

using pymerge::view;  // which the overloads below would hide

void combine(Address out, std::int32_t out_dtype, Address base, std::int32_t base_dtype,
             const std::vector<Address>& inputs, const std::vector<std::int32_t>& dtypes,
             const std::vector<double>& weights, double divisor, std::int64_t numel, int threads) {
    with_combine(out, out_dtype, base, base_dtype, inputs, dtypes, weights, divisor, numel,
                 [&](const CombineParams& p) { combine_cpu(p, threads); });
}

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

void adam_step(Address D, Address m, Address v, Address product, Address B, std::int32_t dtype, std::int64_t numel,
               double beta1, double beta2, double correction1, double correction2, double lr, double eps, int threads) {
    adam_step_cpu({pointer(D), pointer(m), pointer(v), pointer<const void>(product), pointer<const void>(B),
                   checked_dtype(dtype), numel, beta1, beta2, correction1, correction2, lr, eps},
                  threads);
}

void task_dots(Address out, Address base, std::int32_t base_dtype, const std::vector<Address>& inputs,
               const std::vector<std::int32_t>& dtypes, std::int64_t vectors, std::int64_t length, int threads) {
    const Tensors tensors(inputs, dtypes);
    task_dots_cpu({pointer<double>(out), pointer<const void>(base), checked_dtype(base_dtype), tensors.pointers.data(),
                   tensors.dtypes.data(), tensors.count(), vectors, length},
                  threads);
}

}  // namespace

void define_dense(py::module_& module) {
    module.def("combine", &combine, Unlocked());
    module.def("combine_files", &combine_files, Unlocked());
    module.def("is_finite", &is_finite, Unlocked());
    module.def("task_sum", &task_sum, Unlocked());
    module.def("task_stats", &task_stats, Unlocked());
    module.def("adam_step", &adam_step, Unlocked());
    module.def("task_dots", &task_dots, Unlocked());
}

}  // namespace pymerge
