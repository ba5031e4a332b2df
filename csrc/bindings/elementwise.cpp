// Ops that go element by element: nearswap, ram, sce, arcee_fusion.
#include "bindings/arguments.h"
#include "ops/arcee_fusion.h"
#include "ops/nearswap.h"
#include "ops/ram.h"
#include "ops/sce.h"

namespace pymerge {
namespace {

using Experts = std::vector<MatrixView>;

// Points to the arguments.
TaskTensors task_tensors(const char* op, const MatrixView& base, const Experts& experts) {
    return {base, experts.data(), count(experts), common_elements(op, base, experts)};
}

// Throws if the output has not the elements of the inputs.
void check_output(const char* op, const Output& out, const TaskTensors& p) {
    PM_CHECK(out.row_stride == p.numel,
             op << ": " << out.row_stride << " elements of output, " << p.numel << " of input");
}

// The same, and if its dtype is not the one that is computed in.
void check_scores(const char* op, const Output& out, const TaskTensors& p) {
    check_output(op, out, p);
    check_dtype(op, "the output", out.dtype, p.in_double() ? DType::f64 : DType::f32);
}

void nearswap(const Output& out, const MatrixView& base, const MatrixView& expert, double t, double least,
              int threads) {
    const Experts experts{expert};
    const TaskTensors p = task_tensors("nearswap", base, experts);
    check_output("nearswap", out, p);
    nearswap_cpu(out, p, t, least, threads);
}

void ram(const Output& out, const MatrixView& base, const Experts& experts, double epsilon,
         const std::optional<std::vector<double>>& factors, int threads) {
    const TaskTensors p = task_tensors("ram", base, experts);
    check_output("ram", out, p);
    if (factors) check_one_each("ram", experts, "factors", *factors);
    ram_cpu(out, p, epsilon, factors ? factors->data() : nullptr, threads);
}

void ram_counts(Address counts, const MatrixView& base, const Experts& experts, double epsilon, int threads) {
    ram_counts_cpu(pointer<std::int64_t>(counts), task_tensors("ram_counts", base, experts), epsilon, threads);
}

void sce_spread(const Output& out, const MatrixView& base, const Experts& experts, int threads) {
    const TaskTensors p = task_tensors("sce_spread", base, experts);
    check_scores("sce_spread", out, p);
    sce_spread_cpu(out, p, threads);
}

void sce_energies(Address energies, const MatrixView& base, const Experts& experts, Address bits, int threads) {
    sce_energies_cpu(pointer<double>(energies), task_tensors("sce_energies", base, experts),
                     pointer<const std::uint8_t>(bits), threads);
}

void sce(const Output& out, const MatrixView& base, const Experts& experts, Address bits,
         const std::vector<double>& weights, double least, int threads) {
    const TaskTensors p = task_tensors("sce", base, experts);
    check_output("sce", out, p);
    check_one_each("sce", experts, "weights", weights);
    sce_cpu(out, p, pointer<const std::uint8_t>(bits), weights.data(), least, threads);
}

void row_divergence(Address divergence, const MatrixView& base, const MatrixView& expert, std::int64_t rows,
                    std::int64_t columns, int threads) {
    const Experts experts{expert};
    row_divergence_cpu(pointer<double>(divergence), {task_tensors("row_divergence", base, experts), rows, columns},
                       threads);
}

void importance(const Output& out, const MatrixView& base, const MatrixView& expert, Address divergence,
                std::int64_t rows, std::int64_t columns, int threads) {
    const Experts experts{expert};
    const TaskTensors p = task_tensors("importance", base, experts);
    check_scores("importance", out, p);
    importance_cpu(out, {p, rows, columns}, pointer<const double>(divergence), threads);
}

void arcee_fusion(const Output& out, const MatrixView& base, const MatrixView& expert, Address divergence, double least,
                  std::int64_t rows, std::int64_t columns, int threads) {
    const Experts experts{expert};
    const TaskTensors p = task_tensors("arcee_fusion", base, experts);
    check_output("arcee_fusion", out, p);
    arcee_fusion_cpu(out, {p, rows, columns}, pointer<const double>(divergence), least, threads);
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
