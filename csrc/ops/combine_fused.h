// `combine` of a few tensors of one dtype with all of an element's work in registers: nothing goes through the cache
// but inputs and output. The same operations in the same order as block by block, so the same bits.
#pragma once

#include "common/dispatch.h"
#include "common/parallel.h"
#include "ops/combine.h"

namespace pymerge {

constexpr std::int64_t most_fused = 4;  // tensors beside a base

template <class T, int count, bool based, bool divided>
PM_TARGET_CLONES static void combine_elements(T* __restrict to, const T* __restrict base, const T* __restrict first,
                                              const T* __restrict second, const T* __restrict third,
                                              const T* __restrict fourth, const float* weights, float divisor,
                                              std::int64_t n) {
    const float w0 = weights[0], w1 = weights[1], w2 = weights[2], w3 = weights[3];
    for (std::int64_t i = 0; i < n; ++i) {
        const float origin = based ? load<float>(base[i]) : 0.0f;
        float total = combine_step<float>(0.0f, load<float>(first[i]), origin, w0);
        if constexpr (count > 1) total = combine_step<float>(total, load<float>(second[i]), origin, w1);
        if constexpr (count > 2) total = combine_step<float>(total, load<float>(third[i]), origin, w2);
        if constexpr (count > 3) total = combine_step<float>(total, load<float>(fourth[i]), origin, w3);
        if constexpr (divided) total /= divisor;
        to[i] = Round<T>::from(origin + total);
    }
}

template <class T, int count, bool based>
void combine_fused(const CombineParams& p, std::int64_t begin, std::int64_t n) {
    const T* inputs[most_fused] = {};
    float weights[most_fused] = {};
    for (int t = 0; t < count; ++t) {
        inputs[t] = static_cast<const T*>(p.inputs[t].data) + begin;
        weights[t] = static_cast<float>(p.weights[t]);
    }
    const T* base = based ? static_cast<const T*>(p.base.data) + begin : nullptr;
    T* to = static_cast<T*>(p.out.data) + begin;
    const auto call =
        p.divisor == 1.0 ? &combine_elements<T, count, based, false> : &combine_elements<T, count, based, true>;
    call(to, base, inputs[0], inputs[1], inputs[2], inputs[3], weights, static_cast<float>(p.divisor), n);
}

template <class T, bool based>
void combine_fused(const CombineParams& p, std::int64_t begin, std::int64_t n) {
    switch (p.count) {
        case 1: return combine_fused<T, 1, based>(p, begin, n);
        case 2: return combine_fused<T, 2, based>(p, begin, n);
        case 3: return combine_fused<T, 3, based>(p, begin, n);
        default: return combine_fused<T, 4, based>(p, begin, n);
    }
}

// Whether all tensors have one dtype, which is accumulated in float, and are few.
inline bool can_fuse(const CombineParams& p) {
    const DType dtype = p.out.dtype;
    if (dtype == DType::f64 || p.count < 1 || p.count > most_fused) return false;
    if (p.base.data != nullptr && p.base.dtype != dtype) return false;
    return std::all_of(p.inputs, p.inputs + p.count, [&](const MatrixView& each) { return each.dtype == dtype; });
}

inline void combine_fused(const CombineParams& p, std::int64_t begin, std::int64_t n) {
    dispatch(p.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (sizeof(T) < sizeof(double)) {
            p.base.data == nullptr ? combine_fused<T, false>(p, begin, n) : combine_fused<T, true>(p, begin, n);
        }
    });
}

}  // namespace pymerge
