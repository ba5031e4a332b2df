// Where the k largest |W_t - W_0| of each task end: exact, by radix selection. Source: TIES-Merging, arXiv 2306.01708.
#pragma once

#include <cstdint>

#include "common/task_delta.h"

namespace pymerge {

struct TrimThresholdParams {
    std::int64_t* keys;  // [count]: selected is a larger key, or this one at an index below the end
    std::int64_t* ends;  // [count]
    MatrixView base;     // one row of numel elements, as the experts
    const MatrixView* experts;
    const std::int64_t* counts;  // how many to select, 1 to numel - 1
    std::int64_t count;
    std::int64_t numel;
};

void trim_threshold_cpu(const TrimThresholdParams& p, int threads);

// Bytes that the next function works in, all 0 at first.
std::int64_t trim_threshold_scratch(std::int64_t count, std::int64_t numel);
void trim_threshold_cuda(const TrimThresholdParams& p, void* scratch, void* stream);

}  // namespace pymerge
