// pymerge._cuda: the functions for NVIDIA devices.
#include "bindings/arguments.h"
#include "ops/trim_threshold.h"

namespace pymerge {
namespace {

void trim_threshold(Address keys, Address ends, Address scratch, const MatrixView& base,
                    const std::vector<MatrixView>& experts, const std::vector<std::int64_t>& counts, Address stream) {
    check_one_each("trim_threshold", experts, "counts", counts);
    trim_threshold_cuda({pointer<std::int64_t>(keys), pointer<std::int64_t>(ends), base, experts.data(), counts.data(),
                         count(experts), common_elements("trim_threshold", base, experts)},
                        pointer(scratch), pointer(stream));
}

void define(py::module_& module) {
    module.doc() = "Compiled ops for NVIDIA devices; see pymerge.backends.cuda.";
    module.def("trim_threshold", &trim_threshold, Unlocked());
    module.def("trim_threshold_scratch", &trim_threshold_scratch);
    module.def("build_info", [] { return build_info("CUDA architectures " PM_CUDA_ARCHS); });
}

}  // namespace
}  // namespace pymerge

PYBIND11_MODULE(_cuda, module) { pymerge::define(module); }
