// Stands in for CUDA's header so that a C++ compiler builds the .cu files: a thread of a block is a thread of the CPU,
// blocks run one after the other. Enough for the kernels' logic (indices, tiles, barriers); says nothing about speed.
#pragma once

#include <barrier>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

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

inline thread_local dim3 blockIdx, threadIdx;
inline dim3 gridDim, blockDim;
inline std::barrier<>* block_barrier;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

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
    std::barrier<> inside(threads), between(threads);
    block_barrier = &inside;
    std::vector<std::thread> team;
    for (unsigned t = 0; t < threads; ++t) {
        team.emplace_back([&, t] {
            threadIdx = dim3(t);
            for (unsigned y = 0; y < grid.y; ++y) {
                for (unsigned x = 0; x < grid.x; ++x) {
                    blockIdx = dim3(x, y);
                    kernel(argument);
                    between.arrive_and_wait();
                }
            }
        });
    }
    for (std::thread& thread : team) thread.join();
}
