// `sparse_combine` of a few tensors of one dtype with all of an element's work in registers: nothing goes through the
// cache but inputs and output. The same operations in the same order as block by block, so the same bits.
#pragma once

#include <algorithm>

#include "common/bitmask.h"
#include "common/dispatch.h"
#include "ops/sparse_combine.h"

namespace pymerge {

constexpr std::int64_t most_sparse_fused = 4;       // experts
constexpr std::int64_t sparse_fused_elements = 32;  // a mask's word; whole ones are done

// Where it is said what is kept.
enum class Mask { nowhere, bits, keys };

// What all elements share.
template <class T>
struct SparseFused {
    T* to;
    const T* base;
    const T* experts[most_sparse_fused];
    const std::uint8_t* bits[most_sparse_fused];
    KeyRange<float> ranges[most_sparse_fused];
    float sizes[most_sparse_fused];
    float weights[most_sparse_fused];
    float all;
    float scale;
};

template <class T, int count, Mask mask, bool elect, bool normalize>
PM_TARGET_CLONES static void sparse_elements(const SparseFused<T>& p, std::int64_t n) {
    T* __restrict to = p.to;
    const T* __restrict base = p.base;
    const float all = p.all, scale = p.scale;
    for (std::int64_t begin = 0; begin < n; begin += sparse_fused_elements) {
        std::uint32_t words[count];
        KeyRange<float> ranges[count];
        for (int t = 0; t < count; ++t) {
            words[t] = ~0u;
            if constexpr (mask == Mask::bits) memcpy(&words[t], p.bits[t] + begin / 8, sizeof(words[t]));
            if constexpr (mask == Mask::keys) ranges[t] = p.ranges[t].from(begin);
        }
#pragma GCC ivdep
        for (std::int32_t i = 0; i < sparse_fused_elements; ++i) {
            const float origin = load<float>(base[begin + i]);
            float values[count];
            float vote = 0.0f, total = 0.0f, share = all;
#pragma GCC unroll 4
            for (int t = 0; t < count; ++t) {
                const float delta = load<float>(p.experts[t][begin + i]) - origin;
                auto kept = static_cast<std::int32_t>((words[t] >> i) & 1u);
                if constexpr (mask == Mask::keys) kept = ranges[t](delta, i);
                values[t] = delta * static_cast<float>(kept) * p.sizes[t];
                vote += values[t];
            }
            if constexpr (elect) {
                share = 0.0f;
#pragma GCC unroll 4
                for (int t = 0; t < count; ++t) {
                    const float agrees = sparse_agrees<float>(values[t], vote);
                    total += values[t] * agrees;
                    share += p.weights[t] * agrees;
                }
            } else {
                total = vote;
            }
            if constexpr (normalize) total /= share == 0.0f ? 1.0f : share;
            to[begin + i] = Round<T>::from(origin + total * scale);
        }
    }
}

template <class T, int count, Mask mask>
auto sparse_function(const SparseCombineParams& p) {
    if (p.elect && p.normalize) return &sparse_elements<T, count, mask, true, true>;
    if (p.elect) return &sparse_elements<T, count, mask, true, false>;
    return p.normalize ? &sparse_elements<T, count, mask, false, true> : &sparse_elements<T, count, mask, false, false>;
}

template <class T, int count>
auto sparse_function(const SparseCombineParams& p) {
    if (p.bits != nullptr) return sparse_function<T, count, Mask::bits>(p);
    if (p.kept.keys != nullptr) return sparse_function<T, count, Mask::keys>(p);
    return sparse_function<T, count, Mask::nowhere>(p);
}

// Whether all tensors have one dtype, which is accumulated in float, and are few.
inline bool can_fuse(const SparseCombineParams& p) {
    const DType dtype = p.out.dtype;
    if (dtype == DType::f64 || p.base.dtype != dtype || p.count > most_sparse_fused) return false;
    return std::all_of(p.experts, p.experts + p.count, [&](const MatrixView& each) { return each.dtype == dtype; });
}

// Elements begin to begin + n, n a multiple of `sparse_fused_elements` and `begin` of 64.
template <class T>
void sparse_fused(const SparseCombineParams& p, float all, std::int64_t begin, std::int64_t n) {
    SparseFused<T> f{};
    f.to = static_cast<T*>(p.out.data) + begin;
    f.base = static_cast<const T*>(p.base.data) + begin;
    for (std::int64_t t = 0; t < p.count; ++t) {
        f.experts[t] = static_cast<const T*>(p.experts[t].data) + begin;
        if (p.bits != nullptr) f.bits[t] = p.bits + t * mask_bytes(p.numel) + begin / 8;
        f.ranges[t] = key_range<float>(p.kept, p.dropped, t, begin);
        f.sizes[t] = static_cast<float>(p.sizes[t]);
        f.weights[t] = static_cast<float>(p.weights[t]);
    }
    f.all = all;
    f.scale = static_cast<float>(p.scale);
    switch (p.count) {
        case 1: return sparse_function<T, 1>(p)(f, n);
        case 2: return sparse_function<T, 2>(p)(f, n);
        case 3: return sparse_function<T, 3>(p)(f, n);
        default: return sparse_function<T, 4>(p)(f, n);
    }
}

inline void sparse_fused(const SparseCombineParams& p, float all, std::int64_t begin, std::int64_t n) {
    dispatch(p.out.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (sizeof(T) < sizeof(double)) sparse_fused<T>(p, all, begin, n);
    });
}

}  // namespace pymerge
