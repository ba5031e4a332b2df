"""The numerical operations, each with checks and a plain-PyTorch reference. `OPS` maps names to them."""

from __future__ import annotations

from pymerge.ops import (
    combine,
    gradient_flow,
    normal_equations,
    routed_linear,
    spd_solve,
    spectral_filter,
    spectral_refine,
    task_gram,
    task_stats,
    task_sum,
    wudi_adam,
)
from pymerge.ops.base import Op

_MODULES = (
    combine,
    task_stats,
    task_sum,
    task_gram,
    normal_equations,
    wudi_adam,
    gradient_flow,
    spectral_filter,
    spd_solve,
    spectral_refine,
    routed_linear,
)
OPS: dict[str, Op] = {module.OP.name: module.OP for module in _MODULES}
