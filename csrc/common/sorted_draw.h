// Which elements of a row a draw keeps whose probabilities grow with the rank of the magnitude, by sorting the row:
// several times slower than by buckets (common/ranked_draw.h), which are made for float32. float64 is rare.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/task_delta.h"

namespace pymerge {

class SortedDraw {
  public:
    // Limits, as many as columns; they must outlive the draw.
    SortedDraw(const std::uint64_t* limits, std::int64_t columns)
        : limits_(limits), order_(static_cast<std::size_t>(columns)) {}

    // flags[i] = words[i] < limits[rank of |delta[i]|], with ranks from the smallest, equal ones by ascending index.
    void operator()(std::uint32_t* flags, const double* delta, const std::uint32_t* words) {
        std::iota(order_.begin(), order_.end(), 0u);
        std::sort(order_.begin(), order_.end(), [&](std::uint32_t left, std::uint32_t right) {
            return std::tuple(magnitude_key(delta[left]), left) < std::tuple(magnitude_key(delta[right]), right);
        });
        for (std::size_t rank = 0; rank < order_.size(); ++rank) {
            flags[order_[rank]] = words[order_[rank]] < limits_[rank];
        }
    }

  private:
    const std::uint64_t* limits_;       // of each rank
    std::vector<std::uint32_t> order_;  // elements by their magnitude
};

}  // namespace pymerge
