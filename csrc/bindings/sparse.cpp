// Ops on sparse task vectors: selection, masks, and merging what they keep.
#include "bindings/arguments.h"
#include "ops/magnitude_counts.h"
#include "ops/magnitude_mask.h"
#include "ops/random_mask.h"
#include "ops/sparse_combine.h"
#include "ops/trim_threshold.h"

namespace pymerge {

static MaskOutput masks(Address bits, Address before, Address after) {
    return {pointer<std::uint8_t>(bits), pointer<double>(before), pointer<double>(after)};
}

static Selection thresholds(Address keys, Address ends) {
    return {pointer<const std::int64_t>(keys), pointer<const std::int64_t>(ends)};
}

}  // namespace pymerge

template <>
struct pybind11::detail::type_caster<pymerge::MaskOutput> : from_tuple<&pymerge::masks> {};
template <>
struct pybind11::detail::type_caster<pymerge::Selection> : from_tuple<&pymerge::thresholds> {};

namespace pymerge {
namespace {

using Base = std::optional<MatrixView>;
using Experts = std::vector<MatrixView>;
using Thresholds = std::optional<Selection>;

Selection or_all(const Thresholds& found) { return found.value_or(Selection{}); }

void trim_threshold(Address keys, Address ends, const Base& base, const Experts& experts,
                    const std::vector<std::int64_t>& counts, int threads) {
    check_one_each("trim_threshold", experts, "counts", counts);
    trim_threshold_cpu({pointer<std::int64_t>(keys), pointer<std::int64_t>(ends), or_none(base), experts.data(),
                        counts.data(), count(experts), common_elements("trim_threshold", base, experts)},
                       threads);
}

void magnitude_counts(Address counts, const Base& base, const Experts& experts,
                      const std::vector<std::uint64_t>& prefixes, int shift, int bits, bool in_double, int threads) {
    check_one_each("magnitude_counts", experts, "prefixes", prefixes);
    magnitude_counts_cpu({pointer<std::int64_t>(counts), or_none(base), experts.data(), prefixes.data(), shift, bits,
                          in_double, count(experts), common_elements("magnitude_counts", base, experts)},
                         threads);
}

std::int64_t magnitude_place(const Base& base, const MatrixView& expert, std::uint64_t key, std::int64_t left) {
    return magnitude_place_cpu(or_none(base), expert, key, left, common_elements("magnitude_place", base, {expert}));
}

void magnitude_mask(const MaskOutput& out, const Base& base, const Experts& experts, const Thresholds& kept,
                    const Thresholds& dropped, int threads) {
    magnitude_mask_cpu({out, or_none(base), experts.data(), or_all(kept), or_all(dropped), count(experts),
                        common_elements("magnitude_mask", base, experts)},
                       threads);
}

void random_mask(const MaskOutput& out, const Base& base, const Experts& experts, const std::vector<double>& lowest,
                 const std::vector<double>& highest, const std::vector<std::uint64_t>& keys, std::int64_t first,
                 std::int64_t rows, std::int64_t columns, int threads) {
    check_one_each("random_mask", experts, "lowest probabilities", lowest);
    check_one_each("random_mask", experts, "highest probabilities", highest);
    check_one_each("random_mask", experts, "keys", keys);
    check_elements("random_mask", rows * columns, base, experts);
    random_mask_cpu({out, or_none(base), experts.data(), lowest.data(), highest.data(), keys.data(), count(experts),
                     first, rows, columns},
                    threads);
}

void sparse_combine(const Output& out, const MatrixView& base, const Experts& experts, Address bits,
                    const Thresholds& kept, const Thresholds& dropped, const std::vector<double>& sizes,
                    const std::vector<double>& weights, bool elect, bool normalize, double scale, int threads) {
    check_one_each("sparse_combine", experts, "sizes", sizes);
    check_one_each("sparse_combine", experts, "weights", weights);
    check_elements("sparse_combine", out.row_stride, base, experts);
    sparse_combine_cpu({out, base, experts.data(), pointer<const std::uint8_t>(bits), or_all(kept), or_all(dropped),
                        sizes.data(), weights.data(), count(experts), out.row_stride, elect, normalize, scale},
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
