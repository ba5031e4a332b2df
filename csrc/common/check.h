// Checks that throw with values; Python turns them into exceptions. Nothing here ends the process.
#pragma once

#include <sstream>
#include <stdexcept>

#define PM_CHECK(condition, message)                    \
    do {                                                \
        if (!(condition)) {                             \
            std::ostringstream pm_text;                 \
            pm_text << message;                         \
            throw std::invalid_argument(pm_text.str()); \
        }                                               \
    } while (false)

// Only .cu files use this: it needs cuda_runtime.h.
#define PM_CUDA_CHECK(call)                                                                                         \
    do {                                                                                                            \
        const cudaError_t pm_error = (call);                                                                        \
        if (pm_error != cudaSuccess) {                                                                              \
            std::ostringstream pm_text;                                                                             \
            pm_text << #call << ": CUDA error " << static_cast<int>(pm_error) << " (" << cudaGetErrorName(pm_error) \
                    << "): " << cudaGetErrorString(pm_error);                                                       \
            throw std::runtime_error(pm_text.str());                                                                \
        }                                                                                                           \
    } while (false)
