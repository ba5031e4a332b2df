// The one switch from a dtype code to a type.
#pragma once

#include "common/check.h"
#include "common/dtype.h"

namespace pymerge {

template <class T>
struct Tag {
    using type = T;
};

// Calls f(Tag<T>{}) with the type of `dtype`.
template <class F>
decltype(auto) dispatch(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f32: return f(Tag<float>{});
        case DType::f64: return f(Tag<double>{});
        case DType::f16: return f(Tag<Half>{});
        case DType::bf16: return f(Tag<BFloat16>{});
    }
    PM_CHECK(false, "unknown dtype code " << static_cast<int>(dtype) << "; 0 to 3 are known");
}

inline DType checked_dtype(std::int32_t code) {
    PM_CHECK(code >= 0 && code <= 3, "unknown dtype code " << code << "; 0 to 3 are known");
    return static_cast<DType>(code);
}

}  // namespace pymerge
