// Ops on sparse task vectors: selection, masks, and merging what they keep.
#include "bindings/arguments.h"
#include "ops/magnitude_counts.h"
#include "ops/magnitude_mask.h"
#include "ops/random_mask.h"
#include "ops/sparse_combine.h"
#include "ops/trim_threshold.h"

namespace pymerge {
namespace {

using pymerge::view;  // which the overloads below would hide

void trim_threshold(Address keys, Address ends, const Matrix& base, const std::vector<Matrix>& experts,
                    const std::vector<std::int64_t>& counts, std::int64_t numel, int threads) {
    PM_CHECK(experts.size() == counts.size(),
             "trim_threshold: " << experts.size() << " experts, " << counts.size() << " counts; give one of each");
    const std::vector<MatrixView> matrices = views(experts);
    trim_threshold_cpu({pointer<std::int64_t>(keys), pointer<std::int64_t>(ends), view(base), matrices.data(),
                        counts.data(), static_cast<std::int64_t>(experts.size()), numel},
                       threads);
}

void magnitude_counts(Address counts, const Matrix& base, const std::vector<Matrix>& experts,
                      const std::vector<std::uint32_t>& prefixes, int shift, int bits, std::int64_t numel,
                      int threads) {
    PM_CHECK(experts.size() == prefixes.size(),
             "magnitude_counts: " << experts.size() << " experts, " << prefixes.size() << " prefixes; give one of each");
    const std::vector<MatrixView> matrices = views(experts);
    magnitude_counts_cpu({pointer<std::int64_t>(counts), view(base), matrices.data(), prefixes.data(), shift, bits,
                          static_cast<std::int64_t>(experts.size()), numel},
                         threads);
}

std::int64_t magnitude_place(const Matrix& base, const Matrix& expert, std::uint32_t key, std::int64_t left,
                             std::int64_t numel) {
    return magnitude_place_cpu(view(base), view(expert), key, left, numel);
}

using Masks = std::tuple<Address, Address, Address>;  // bits, L1 norms before, after
using Selected = std::tuple<Address, Address>;        // keys, ends; 0 and 0: nothing

MaskOutput view(const Masks& m) {
    return {pointer<std::uint8_t>(std::get<0>(m)), pointer<double>(std::get<1>(m)), pointer<double>(std::get<2>(m))};
}

Selection view(const Selected& s) {
    return {pointer<const std::int64_t>(std::get<0>(s)), pointer<const std::int64_t>(std::get<1>(s))};
}

void magnitude_mask(const Masks& out, const Matrix& base, const std::vector<Matrix>& experts, const Selected& kept,
                    const Selected& dropped, std::int64_t numel, int threads) {
    const std::vector<MatrixView> matrices = views(experts);
    magnitude_mask_cpu({view(out), view(base), matrices.data(), view(kept), view(dropped),
                        static_cast<std::int64_t>(experts.size()), numel},
                       threads);
}

void random_mask(const Masks& out, const Matrix& base, const std::vector<Matrix>& experts,
                 const std::vector<double>& lowest, const std::vector<double>& highest,
                 const std::vector<std::uint64_t>& keys, std::int64_t first, std::int64_t rows, std::int64_t columns,
                 int threads) {
    PM_CHECK(experts.size() == lowest.size() && experts.size() == highest.size() && experts.size() == keys.size(),
             "random_mask: " << experts.size() << " experts, " << lowest.size() << " and " << highest.size()
                             << " probabilities, " << keys.size() << " keys; give one of each");
    const std::vector<MatrixView> matrices = views(experts);
    random_mask_cpu({view(out), view(base), matrices.data(), lowest.data(), highest.data(), keys.data(),
                     static_cast<std::int64_t>(experts.size()), first, rows, columns},
                    threads);
}

void sparse_combine(Address out, std::int32_t out_dtype, const Matrix& base, const std::vector<Matrix>& experts,
                    Address bits, const Selected& kept, const Selected& dropped, const std::vector<double>& sizes,
                    const std::vector<double>& weights, std::int64_t numel, bool elect, bool normalize, double scale,
                    int threads) {
    PM_CHECK(experts.size() == sizes.size() && experts.size() == weights.size(),
             "sparse_combine: " << experts.size() << " experts, " << sizes.size() << " sizes, " << weights.size()
                                << " weights; give one of each");
    const std::vector<MatrixView> matrices = views(experts);
    sparse_combine_cpu({pointer(out), checked_dtype(out_dtype), view(base), matrices.data(),
                        pointer<const std::uint8_t>(bits), view(kept), view(dropped), sizes.data(), weights.data(),
                        static_cast<std::int64_t>(experts.size()), numel, elect, normalize, scale},
                       threads);
}

}  // namespace

void define_sparse(py::module_& module) {
    module.def("trim_threshold", &trim_threshold, Unlocked());
    module.def("magnitude_counts", &magnitude_counts, Unlocked());
    module.def("magnitude_place", &magnitude_place, Unlocked());
    module.def("magnitude_mask", &magnitude_mask, Unlocked());
    module.def("random_mask", &random_mask, Unlocked());
    module.def("sparse_combine", &sparse_combine, Unlocked());
}

}  // namespace pymerge
