// What all bindings share: arguments as Python passes them. Pointers, streams and dtypes come as integers; Python has
// checked devices, shapes, contiguity and overlap, and owns every buffer. Only this folder includes pybind11.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "ops/combine.h"
#include "ops/task_vector.h"

namespace pymerge {

namespace py = pybind11;
using Address = std::uintptr_t;
using Matrix = std::tuple<Address, std::int32_t, std::int64_t>;  // address, dtype code, row stride
// No op touches a Python object.
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

inline MatrixView view(const Matrix& m) {
    return {pointer<const void>(std::get<0>(m)), checked_dtype(std::get<1>(m)), std::get<2>(m)};
}

inline std::vector<MatrixView> views(const std::vector<Matrix>& matrices) {
    std::vector<MatrixView> result;
    for (const Matrix& m : matrices) result.push_back(view(m));
    return result;
}

// Tensors as two lists, of their addresses and of their dtypes.
struct Tensors {
    Tensors(const std::vector<Address>& addresses, const std::vector<std::int32_t>& codes) {
        PM_CHECK(addresses.size() == codes.size(),
                 addresses.size() << " inputs, " << codes.size() << " dtypes; give one of each");
        for (std::size_t t = 0; t < addresses.size(); ++t) {
            pointers.push_back(pointer<const void>(addresses[t]));
            dtypes.push_back(checked_dtype(codes[t]));
        }
    }

    std::int64_t count() const { return static_cast<std::int64_t>(pointers.size()); }

    std::vector<const void*> pointers;
    std::vector<DType> dtypes;
};

// Calls f(CombineParams); what the struct points to lives until f returns.
template <class F>
void with_combine(Address out, std::int32_t out_dtype, Address base, std::int32_t base_dtype,
                  const std::vector<Address>& inputs, const std::vector<std::int32_t>& dtypes,
                  const std::vector<double>& weights, double divisor, std::int64_t numel, F&& f) {
    PM_CHECK(inputs.size() == weights.size(),
             "combine: " << inputs.size() << " inputs, " << weights.size() << " weights; give one of each");
    const Tensors tensors(inputs, dtypes);
    f(CombineParams{pointer(out), checked_dtype(out_dtype), pointer<const void>(base), checked_dtype(base_dtype),
                    tensors.pointers.data(), tensors.dtypes.data(), weights.data(), divisor, tensors.count(), numel});
}

// C++ standard, compiler, and what else was decided when this was built.
inline std::string build_info(const std::string& more) {
    std::string text = "C++" + std::to_string(__cplusplus / 100 % 100);
#if defined(__VERSION__)
    text += ", compiler " __VERSION__;
#endif
    return text + ", " + more;
}

// Each file of the CPU's bindings adds its functions to pymerge._C.
void define_dense(py::module_& module);
void define_sparse(py::module_& module);
void define_elementwise(py::module_& module);
void define_routed(py::module_& module);

}  // namespace pymerge
