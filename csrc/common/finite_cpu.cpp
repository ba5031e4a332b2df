#include "common/finite.h"

#include "common/parallel.h"

namespace pymerge {
namespace {

// Whether an exponent is all ones. Without a branch, so that the loop vectorises.
template <class Bits>
PM_TARGET_CLONES bool any_special(const Bits* __restrict values, Bits exponent, std::int64_t n) {
    Bits found = 0;
    for (std::int64_t i = 0; i < n; ++i) found |= static_cast<Bits>((values[i] & exponent) == exponent);
    return found != 0;
}

}  // namespace

bool is_finite_cpu(const void* values, DType dtype, std::int64_t n) {
    switch (dtype) {
        case DType::f64:
            return !any_special<std::uint64_t>(static_cast<const std::uint64_t*>(values), 0x7ff0000000000000u, n);
        case DType::f16: return !any_special<std::uint16_t>(static_cast<const std::uint16_t*>(values), 0x7c00u, n);
        case DType::bf16: return !any_special<std::uint16_t>(static_cast<const std::uint16_t*>(values), 0x7f80u, n);
        default: return !any_special<std::uint32_t>(static_cast<const std::uint32_t*>(values), 0x7f800000u, n);
    }
}

}  // namespace pymerge
