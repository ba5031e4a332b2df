#include "ops/combine.h"

#include "common/device.h"

namespace pymerge {
namespace {

constexpr int threads_per_block = 256;
constexpr std::int64_t blocks_at_most = 1 << 16;  // beyond, a thread takes several elements
constexpr std::int64_t tasks_at_most = 128;       // kernel arguments hold 4 KiB

struct Input {
    const void* data;
    double weight;
    DType dtype;
};

struct Arguments {
    void* out;
    const void* base;
    std::int64_t numel;
    double divisor;
    DType out_dtype;
    DType base_dtype;
    int count;
    Input inputs[tasks_at_most];
};
static_assert(sizeof(Arguments) <= 4096);

template <class A>
__global__ void combine_kernel(const __grid_constant__ Arguments a) {
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
    for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < a.numel; i += stride) {
        const A origin = a.base == nullptr ? A(0) : load_at<A>(a.base, a.base_dtype, i);
        A total = A(0);
        for (int t = 0; t < a.count; ++t) {
            const Input& input = a.inputs[t];
            total =
                combine_step<A>(total, load_at<A>(input.data, input.dtype, i), origin, static_cast<A>(input.weight));
        }
        if (a.divisor != 1.0) total /= static_cast<A>(a.divisor);
        store_at<A>(a.out, a.out_dtype, i, origin + total);
    }
}

}  // namespace

void combine_cuda(const CombineParams& p, void* stream) {
    PM_CHECK(p.numel >= 0, "combine: " << p.numel << " elements");
    PM_CHECK(p.count <= tasks_at_most,
             "combine: " << p.count << " inputs; one launch takes " << tasks_at_most << ", use --backend reference");
    if (p.numel == 0) return;
    Arguments a{p.out.data, p.base.data, p.numel, p.divisor, p.out.dtype, p.base.dtype, static_cast<int>(p.count), {}};
    for (std::int64_t t = 0; t < p.count; ++t) a.inputs[t] = {p.inputs[t].data, p.weights[t], p.inputs[t].dtype};
    const std::int64_t needed = (p.numel + threads_per_block - 1) / threads_per_block;
    const unsigned blocks = static_cast<unsigned>(std::min(needed, blocks_at_most));
    const auto on = static_cast<cudaStream_t>(stream);
    if (combine_in_double(p)) {
        combine_kernel<double><<<blocks, threads_per_block, 0, on>>>(a);
    } else {
        combine_kernel<float><<<blocks, threads_per_block, 0, on>>>(a);
    }
    PM_CUDA_CHECK(cudaGetLastError());
}

}  // namespace pymerge
