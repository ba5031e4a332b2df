// Stands in for CUDA's header so that a C++ compiler builds the .cu files. A thread of a block is a coroutine with a
// stack of its own; blocks run one after the other. A thread runs until it waits for others, then the next one does: a
// barrier that is missing shows, since threads are then as far apart as they can be. Enough for the kernels' logic
// (indices, parts, barriers); says nothing about speed.
#pragma once

#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

inline dim3 blockIdx, threadIdx, gridDim, blockDim;

namespace emulation {

constexpr std::size_t stack_bytes = 64 * 1024;

// Arrivals at a barrier; a thread waits for the round to change.
struct Barrier {
    unsigned arrived = 0;
    unsigned round = 0;
};

struct Thread {
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    ucontext_t first;
    jmp_buf state;
    bool started = false;
    bool done = false;
    const Barrier* waits_for = nullptr;
    unsigned round = 0;
};

inline std::vector<Thread> team;
inline Barrier block;
inline jmp_buf scheduler;
inline std::function<void()> body;

inline Thread& current() { return team[threadIdx.x]; }

inline void run_thread() {
    body();
    current().done = true;
    _longjmp(scheduler, 1);
}

inline void wait(Barrier& barrier, unsigned members) {
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        ++barrier.round;
        return;
    }
    Thread& self = current();
    self.waits_for = &barrier;
    self.round = barrier.round;
    if (_setjmp(self.state) == 0) _longjmp(scheduler, 1);
}

// Lets thread t run until it waits or ends.
inline void resume(unsigned t) {
    threadIdx = dim3(t);
    Thread& thread = team[t];
    thread.waits_for = nullptr;
    if (_setjmp(scheduler) != 0) return;
    if (thread.started) _longjmp(thread.state, 1);
    thread.started = true;
    getcontext(&thread.first);
    thread.first.uc_stack.ss_sp = thread.stack.get();
    thread.first.uc_stack.ss_size = stack_bytes;
    thread.first.uc_link = nullptr;
    makecontext(&thread.first, run_thread, 0);
    setcontext(&thread.first);
}

inline void run_block(unsigned threads) {
    for (Thread& thread : team) thread.started = thread.done = false;
    for (bool running = true; running;) {
        running = false;
        bool moved = false;
        for (unsigned t = 0; t < threads; ++t) {
            Thread& thread = team[t];
            running |= !thread.done;
            if (thread.done || (thread.waits_for != nullptr && thread.waits_for->round == thread.round)) continue;
            resume(t);
            moved = true;
        }
        if (running && !moved) throw std::logic_error("threads wait at a barrier that others have passed by");
    }
}

}  // namespace emulation

// Threads take turns, so that what one of them does is not divided.
template <class T>
T atomicAdd(T* to, T value) {
    const T before = *to;
    *to += value;
    return before;
}

inline void __syncthreads() { emulation::wait(emulation::block, blockDim.x); }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return ""; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

// kernel<<<grid, threads, 0, stream>>>(argument) is rewritten to this.
template <class Kernel, class Argument>
void emulate(Kernel kernel, dim3 grid, unsigned threads, cudaStream_t, const Argument& argument) {
    gridDim = grid;
    blockDim = dim3(threads);
    emulation::team = std::vector<emulation::Thread>(threads);
    emulation::block = {};
    emulation::body = [&] { kernel(argument); };
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y);
            emulation::run_block(threads);
        }
    }
}
