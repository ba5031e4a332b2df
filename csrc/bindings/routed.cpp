// Weights that are mixed for each sample (WEMoE): dense and sparse task vectors.
#include <variant>

#include "bindings/arguments.h"
#include "ops/mix_weights.h"
#include "ops/routed_linear.h"

namespace pymerge {

static DenseTasks dense_tasks(Address data, std::int32_t dtype, std::int64_t stride, std::int64_t count) {
    return {pointer<const void>(data), checked_dtype(dtype), stride, count};
}

static SparseTasks sparse_tasks(Address values, std::int32_t dtype, Address columns, bool wide, Address starts,
                                std::int64_t start_stride, std::int64_t count) {
    const auto* entries = pointer<const std::int64_t>(starts);
    return {pointer(values), checked_dtype(dtype), pointer(columns), wide, entries, start_stride, count};
}

}  // namespace pymerge

template <>
struct pybind11::detail::type_caster<pymerge::DenseTasks> : from_tuple<&pymerge::dense_tasks> {};
template <>
struct pybind11::detail::type_caster<pymerge::SparseTasks> : from_tuple<&pymerge::sparse_tasks> {};

namespace pymerge {
namespace {

MixParams mix_params(const char* op, const Output& out, const MatrixView& base, Address gates, std::int64_t samples,
                     std::int64_t rows, std::int64_t columns) {
    PM_CHECK(base.row_stride == rows * columns,
             op << ": the base has " << base.row_stride << " elements, not " << rows << " x " << columns);
    const std::int64_t numel = samples * rows * columns;
    PM_CHECK(out.row_stride == numel, op << ": the output has " << out.row_stride << " elements, not " << samples
                                         << " x " << rows << " x " << columns);
    return {out, base, pointer<const float>(gates), samples, rows, columns};
}

void mix_dense(const Output& out, const MatrixView& base, Address gates, const DenseTasks& tasks, std::int64_t samples,
               std::int64_t rows, std::int64_t columns, int threads) {
    mix_dense_cpu(mix_params("mix_dense", out, base, gates, samples, rows, columns), tasks, threads);
}

void mix_sparse(const Output& out, const MatrixView& base, Address gates, const SparseTasks& tasks,
                std::int64_t samples, std::int64_t rows, std::int64_t columns, int threads) {
    mix_sparse_cpu(mix_params("mix_sparse", out, base, gates, samples, rows, columns), tasks, threads);
}

void dots_dense(Address out, const MatrixView& delta, const DenseTasks& tasks, int threads) {
    check_dtype("dots_dense", "delta", delta.dtype, DType::f32);
    dots_dense_cpu(pointer<double>(out), static_cast<const float*>(delta.data), delta.row_stride, tasks, threads);
}

void dots_sparse(Address out, const MatrixView& delta, const SparseTasks& tasks, std::int64_t rows,
                 std::int64_t columns, int threads) {
    check_dtype("dots_sparse", "delta", delta.dtype, DType::f32);
    PM_CHECK(delta.row_stride == rows * columns,
             "dots_sparse: delta has " << delta.row_stride << " elements, not " << rows << " x " << columns);
    dots_sparse_cpu(pointer<double>(out), static_cast<const float*>(delta.data), rows, columns, tasks, threads);
}

void add_sparse_products(const Output& y, Address x, Address gates, const SparseTasks& tasks, std::int64_t tokens,
                         std::int64_t rows, std::int64_t columns, int threads) {
    check_dtype("add_sparse_products", "y", y.dtype, DType::f32);
    add_sparse_products_cpu(static_cast<float*>(y.data), y.row_stride, pointer<const float>(x),
                            pointer<const float>(gates), tokens, rows, columns, tasks, threads);
}

using Tasks = std::variant<DenseTasks, SparseTasks>;

// Points to the arguments.
RoutedWeight routed_weight(const char* op, const MatrixView& base, std::int64_t rows, std::int64_t columns,
                           const Tasks& tasks) {
    PM_CHECK(base.row_stride == rows * columns,
             op << ": the weight has " << base.row_stride << " elements, not " << rows << " x " << columns);
    const std::int64_t count = std::visit([](const auto& found) { return found.count; }, tasks);
    return {base, rows, columns, std::get_if<DenseTasks>(&tasks), std::get_if<SparseTasks>(&tasks), count};
}

void routed_product(Address y, Address x, const std::vector<std::int64_t>& ends, Address gates, Address bias,
                    bool transposed, const MatrixView& weight, const Tasks& tasks, std::int64_t rows,
                    std::int64_t columns, int lanes, int threads) {
    routed_product_cpu({pointer<float>(y), pointer<const float>(x), ends.data(), pointer<const float>(gates),
                        pointer<const float>(bias), static_cast<std::int64_t>(ends.size()) - 1, transposed,
                        routed_weight("routed_product", weight, rows, columns, tasks)},
                       lanes, threads);
}

void routed_gates(Address out, Address dy, Address x, const std::vector<std::int64_t>& ends, const MatrixView& weight,
                  const Tasks& tasks, std::int64_t rows, std::int64_t columns, int lanes, int threads) {
    routed_gates_cpu({pointer<double>(out), pointer<const float>(dy), pointer<const float>(x), ends.data(),
                      static_cast<std::int64_t>(ends.size()) - 1,
                      routed_weight("routed_gates", weight, rows, columns, tasks)},
                     lanes, threads);
}

}  // namespace

void define_routed(py::module_& module) {
    module.def("mix_dense", &mix_dense, Unlocked());
    module.def("mix_sparse", &mix_sparse, Unlocked());
    module.def("dots_dense", &dots_dense, Unlocked());
    module.def("dots_sparse", &dots_sparse, Unlocked());
    module.def("add_sparse_products", &add_sparse_products, Unlocked());
    module.def("routed_product", &routed_product, Unlocked());
    module.def("routed_gates", &routed_gates, Unlocked());
    module.def("routed_lanes", &routed_lanes);
}

}  // namespace pymerge
