// pymerge._C: the CPU's functions.
#include "bindings/arguments.h"

PYBIND11_MODULE(_C, module) {
    module.doc() = "Compiled ops for the CPU; see pymerge.backends.native.";
    pymerge::define_dense(module);
    pymerge::define_sparse(module);
    pymerge::define_elementwise(module);
    pymerge::define_routed(module);
    module.def("build_info", [] {
#if defined(_OPENMP)
        return pymerge::build_info("OpenMP");
#else
        return pymerge::build_info("threads without OpenMP");
#endif
    });
}
