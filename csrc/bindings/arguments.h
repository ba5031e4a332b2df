// What all bindings share: arguments as Python passes them. Python has checked devices, shapes, contiguity and overlap,
// and owns every buffer. Only this folder includes pybind11.
//
// A tensor is a tuple (address, dtype code, row stride or, of one row, elements), and None where it may be absent.
// Memory whose dtype a function fixes is an address alone, 0 where it may be absent. Streams are addresses.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/matrix_view.h"

namespace pymerge {

namespace py = pybind11;
using Address = std::uintptr_t;
// No op touches a Python object.
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <class T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

inline MatrixView matrix_view(Address address, std::int32_t dtype, std::int64_t row_stride) {
    return {pointer<const void>(address), checked_dtype(dtype), row_stride};
}

inline Output output(Address address, std::int32_t dtype, std::int64_t row_stride) {
    return {pointer(address), checked_dtype(dtype), row_stride};
}

// What an op takes for a base that is absent.
inline MatrixView or_none(const std::optional<MatrixView>& base) { return base.value_or(MatrixView{}); }

// Throws if one of the tensors, each seen as one row, has not `numel` elements.
inline void check_elements(const char* op, std::int64_t numel, const std::optional<MatrixView>& base,
                           const std::vector<MatrixView>& tensors, const char* each = "expert") {
    PM_CHECK(!base || base->row_stride == numel,
             op << ": the base has " << base->row_stride << " elements, not " << numel);
    for (std::size_t t = 0; t < tensors.size(); ++t) {
        PM_CHECK(tensors[t].row_stride == numel,
                 op << ": " << each << " " << t << " has " << tensors[t].row_stride << " elements, not " << numel);
    }
}

// The number of elements that the base and the experts have, if they all have as many.
inline std::int64_t common_elements(const char* op, const std::optional<MatrixView>& base,
                                    const std::vector<MatrixView>& experts) {
    const std::int64_t numel = base ? base->row_stride : experts.empty() ? 0 : experts[0].row_stride;
    check_elements(op, numel, base, experts);
    return numel;
}

// Throws if there is not one of `given` for each of `tensors`.
template <class T>
void check_one_each(const char* op, const std::vector<MatrixView>& tensors, const char* what,
                    const std::vector<T>& given, const char* each = "expert") {
    PM_CHECK(tensors.size() == given.size(), op << ": " << tensors.size() << " " << each << "s, " << given.size() << " "
                                                << what << "; give one of each");
}

inline void check_dtype(const char* op, const char* what, DType dtype, DType wanted) {
    PM_CHECK(dtype == wanted, op << ": the dtype code of " << what << " is " << static_cast<int>(dtype) << ", not "
                                 << static_cast<int>(wanted));
}

inline std::int64_t count(const std::vector<MatrixView>& tensors) { return static_cast<std::int64_t>(tensors.size()); }

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

namespace pybind11::detail {

// Turns a Python tuple of what `make` takes into what it returns.
template <auto make>
struct from_tuple;

template <class T, class... Parts, T (*make)(Parts...)>
struct from_tuple<make> {
    using Tuple = std::tuple<Parts...>;
    PYBIND11_TYPE_CASTER(T, make_caster<Tuple>::name);

    bool load(handle source, bool convert) {
        make_caster<Tuple> parts;
        if (!parts.load(source, convert)) return false;
        value = std::apply(make, cast_op<Tuple>(std::move(parts)));
        return true;
    }
};

template <>
struct type_caster<pymerge::MatrixView> : from_tuple<&pymerge::matrix_view> {};
template <>
struct type_caster<pymerge::Output> : from_tuple<&pymerge::output> {};

}  // namespace pybind11::detail
