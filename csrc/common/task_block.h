// Blocks of W_0 and of all task vectors as float or double, for ops that go element by element.
#pragma once

#include <vector>

#include "common/bitmask.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/task_tensors.h"

namespace pymerge {

constexpr std::int64_t task_block = 512;  // elements of all tensors that are in the cache together
constexpr std::int64_t task_chunk = 32 * task_block;

template <class A, class T>
PM_TARGET_CLONES static inline void read_values(A* __restrict to, const T* __restrict from, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = load<A>(from[i]);
}

template <class A, class T>
PM_TARGET_CLONES static inline void write_values(T* __restrict to, const A* __restrict from, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Round<T>::from(from[i]);
}

template <class A, class T>
PM_TARGET_CLONES static inline void read_deltas(A* __restrict to, const T* __restrict from, const A* __restrict origin,
                                                std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = load<A>(from[i]) - origin[i];
}

template <class A>
PM_TARGET_CLONES static inline void multiply(A* __restrict values, const A* __restrict factors, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) values[i] *= factors[i];
}

// A block of W_0, of all task vectors, and room for three more rows.
template <class A>
class TaskBlock {
  public:
    explicit TaskBlock(const TaskTensors& p) : p_(p), values_(static_cast<std::size_t>((p.count + 4) * task_block)) {}

    A* tau(std::int64_t t) { return values_.data() + t * task_block; }
    A* origin() { return tau(p_.count); }
    A* row(std::int64_t k) { return tau(p_.count + 1 + k); }

    void read(A* to, const MatrixView& from, std::int64_t at, std::int64_t n) {
        dispatch(from.dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            read_values<A, T>(to, static_cast<const T*>(from.data) + at, n);
        });
    }

    void read_taus(std::int64_t at, std::int64_t n, const std::uint8_t* selected = nullptr) {
        read(origin(), p_.base, at, n);
        A* keep = row(0);
        if (selected != nullptr) unpack_bits<A>(keep, selected + at / 8, n);
        for (std::int64_t t = 0; t < p_.count; ++t) {
            dispatch(p_.experts[t].dtype, [&](auto tag) {
                using T = typename decltype(tag)::type;
                read_deltas<A, T>(tau(t), static_cast<const T*>(p_.experts[t].data) + at, origin(), n);
            });
            if (selected != nullptr) multiply<A>(tau(t), keep, n);
        }
    }

    void write(const Output& out, const A* from, std::int64_t at, std::int64_t n) {
        dispatch(out.dtype, [&](auto tag) {
            using T = typename decltype(tag)::type;
            write_values<A, T>(static_cast<T*>(out.data) + at, from, n);
        });
    }

  private:
    const TaskTensors& p_;
    std::vector<A> values_;
};

// Calls f(block, chunk, at, n) for all blocks, those of a chunk in order.
template <class A, class F>
void for_each_task_block(const TaskTensors& p, int threads, F&& f) {
    for_each_chunk(p.numel, task_chunk, threads, [&](std::int64_t begin, std::int64_t end) {
        TaskBlock<A> block(p);
        for (std::int64_t at = begin; at < end; at += task_block) {
            f(block, begin / task_chunk, at, std::min(task_block, end - at));
        }
    });
}

template <class F>
void in_compute_type(const TaskTensors& p, F&& f) {
    PM_CHECK(p.numel >= 0 && p.count > 0, "task tensors: " << p.count << " of " << p.numel << " elements");
    if (p.in_double()) {
        f(Tag<double>{});
    } else {
        f(Tag<float>{});
    }
}

}  // namespace pymerge
