// Weights that are mixed for each sample (WEMoE): dense and sparse task vectors.
#include <variant>

#include "bindings/arguments.h"
#include "ops/mix_weights.h"
#include "ops/routed_linear.h"

namespace pymerge {
namespace {

using pymerge::view;  // which the overloads below would hide

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
