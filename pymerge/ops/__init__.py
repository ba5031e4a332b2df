"""The numerical operations, each with checks and a plain-PyTorch reference. `OPS` maps names to them."""

from __future__ import annotations

from pymerge.ops import (
    arcee_fusion,
    combine,
    combine_vectors,
    gradient_flow,
    isotropic,
    magnitude_counts,
    magnitude_mask,
    nearswap,
    normal_equations,
    ram,
    random_mask,
    routed_linear,
    sce,
    singular_sum,
    sparse_combine,
    spd_solve,
    spectral_filter,
    spectral_refine,
    task_dots,
    task_gram,
    task_stats,
    task_sum,
    trim_threshold,
    wudi_adam,
)
from pymerge.ops.base import Op

_MODULES = (
    combine,
    trim_threshold,
    magnitude_counts,
    magnitude_mask,
    random_mask,
    sparse_combine,
    task_stats,
    task_sum,
    task_gram,
    normal_equations,
    wudi_adam,
    gradient_flow,
    spectral_filter,
    spd_solve,
    spectral_refine,
    singular_sum,
    isotropic,
    routed_linear,
    task_dots,
    combine_vectors,
    nearswap,
    ram,
    sce,
    arcee_fusion,
)
OPS: dict[str, Op] = {module.OP.name: module.OP for module in _MODULES}
