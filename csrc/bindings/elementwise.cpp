// Ops that go element by element: nearswap, ram, sce, arcee_fusion.
#include "bindings/arguments.h"
#include "ops/elementwise.h"
#include "ops/row_divergence.h"

namespace pymerge {
namespace {

// base, its dtype, experts, their dtypes, elements
using Tasks = std::tuple<Address, std::int32_t, std::vector<Address>, std::vector<std::int32_t>, std::int64_t>;
using Target = std::tuple<Address, std::int32_t>;

// Calls f(TaskTensors); what the struct points to lives until f returns.
template <class F>
void with_tasks(const Tasks& tasks, F&& f) {
    const auto& [base, base_dtype, experts, dtypes, numel] = tasks;
    const Tensors tensors(experts, dtypes);
    f(TaskTensors{pointer<const void>(base), checked_dtype(base_dtype), tensors.pointers.data(),
                  tensors.dtypes.data(), tensors.count(), numel});
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
        sce_energies_cpu(pointer<double>(energies), p, pointer<const std::uint8_t>(selected), threads);
    });
}

void sce(const Target& out, const Tasks& tasks, Address selected, const std::vector<double>& weights, double least,
         int threads) {
    with_tasks(tasks, [&](const TaskTensors& p) {
        PM_CHECK(static_cast<std::int64_t>(weights.size()) == p.count,
                 "sce: " << weights.size() << " weights for " << p.count << " experts; give one of each");
        sce_cpu(output(out), p, pointer<const std::uint8_t>(selected), weights.data(), least, threads);
    });
}

void row_divergence(Address divergence, const Tasks& tasks, std::int64_t rows, std::int64_t columns, int threads) {
    with_tasks(tasks, [&](const TaskTensors& p) {
        row_divergence_cpu(pointer<double>(divergence), {p, rows, columns}, threads);
    });
}

void importance(Address out, const Tasks& tasks, Address divergence, std::int64_t rows, std::int64_t columns,
                int threads) {
    with_tasks(tasks, [&](const TaskTensors& p) {
        importance_cpu(pointer(out), {p, rows, columns}, pointer<const double>(divergence), threads);
    });
}

void arcee_fusion(const Target& out, const Tasks& tasks, Address divergence, double least, std::int64_t rows,
                  std::int64_t columns, int threads) {
    with_tasks(tasks, [&](const TaskTensors& p) {
        arcee_fusion_cpu(output(out), {p, rows, columns}, pointer<const double>(divergence), least, threads);
    });
}

}  // namespace

void define_elementwise(py::module_& module) {
    module.def("nearswap", &nearswap, Unlocked());
    module.def("ram", &ram, Unlocked());
    module.def("ram_counts", &ram_counts, Unlocked());
    module.def("sce_spread", &sce_spread, Unlocked());
    module.def("sce_energies", &sce_energies, Unlocked());
    module.def("sce", &sce, Unlocked());
    module.def("row_divergence", &row_divergence, Unlocked());
    module.def("importance", &importance, Unlocked());
    module.def("arcee_fusion", &arcee_fusion, Unlocked());
}

}  // namespace pymerge
