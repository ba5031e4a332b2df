// Masks that keep a range of magnitudes of each task vector, and its L1 norms before and after.
#pragma once

#include "ops/task_vector.h"

namespace pymerge {

struct MaskOutput {
    std::uint8_t* bits;  // count rows of mask_bytes(numel); see common/bitmask.h
    double* before;      // [count]: sum of |tau|; or null: nobody wants the norms
    double* after;       // [count]: the same over what is kept
};

// The selected elements of each task: a key above keys[t], or equal to it at an index below ends[t].
struct Selection {
    const std::int64_t* keys;
    const std::int64_t* ends;
};

struct MagnitudeMaskParams {
    MaskOutput out;
    MatrixView base;  // one row of numel elements, as the experts
    const MatrixView* experts;
    Selection kept;
    Selection dropped;  // of those kept; keys null: nothing
    std::int64_t count;
    std::int64_t numel;
};

void magnitude_mask_cpu(const MagnitudeMaskParams& p, int threads);

}  // namespace pymerge
