// The arguments of `combine`, which both modules have.
#pragma once

#include "bindings/arguments.h"
#include "ops/combine.h"

namespace pymerge {

// Points to the arguments.
inline CombineParams combine_params(const Output& out, const std::optional<MatrixView>& base,
                                    const std::vector<MatrixView>& tensors, const std::vector<double>& weights,
                                    double divisor) {
    check_one_each("combine", tensors, "weights", weights, "tensor");
    check_elements("combine", out.row_stride, base, tensors, "tensor");
    return {out, or_none(base), tensors.data(), weights.data(), divisor, count(tensors), out.row_stride};
}

}  // namespace pymerge
