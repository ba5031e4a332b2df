// `combine` on tensors that lie in files: read block by block into memory that stays in the cache.
#pragma once

#include <cstdint>

#include "common/matrix_view.h"

namespace pymerge {

// Elements from byte `offset` of an open file on, contiguous.
struct FileTensor {
    int descriptor;
    std::int64_t offset;
    DType dtype;
};

struct CombineFilesParams {
    Output out;
    const FileTensor* base;    // null: origin 0
    const FileTensor* inputs;  // count of them; none: the base, converted
    const double* weights;
    double divisor;
    std::int64_t count;  // T
    std::int64_t numel;  // elements of every tensor
    std::int64_t block;  // of which so many are read at once
    bool check_inputs;   // whether NaN and infinity are looked for in the inputs, or in the result alone
};

struct CombineFilesResult {
    bool finite = true;           // as far as was looked
    std::int64_t failed = -1;     // which file could not be read, counted from the base on; -1: none
    int error = 0;                // errno of that read; 0: the file ended
    std::int64_t at = 0;          // where in the file
    std::int64_t reading_ns = 0;  // time spent in reads
};

// Stops at the first read that fails. The same bytes as `combine` on the same tensors in memory.
CombineFilesResult combine_files_cpu(const CombineFilesParams& p);

}  // namespace pymerge
