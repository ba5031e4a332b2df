"""Tensors that may be constants of the architecture: masks, inverse frequencies, tables of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pymerge.architecture.roles import Kind, Role
from pymerge.common.dtypes import ITEM_SIZES, NATIVE

# Of a mask of 4096 x 4096 in float32: what is compared when a merge is planned.
_MOST_BYTES = 64 << 20


def may_be_constant(name: str, role: Role, dtype: str, shape: Sequence[int]) -> bool:
    """Whether a tensor, by name and shape, may be a buffer that no training changes; the values of all models tell.

    Weights, norms, biases and tables of tokens are none. A scalar, a vector with a name of its own (masked_bias), a
    bias of several axes (GPT-2's causal mask is called bias), or whatever else is neither may be one.
    """
    if dtype not in NATIVE or 0 in shape or math.prod(shape) * ITEM_SIZES[dtype] > _MOST_BYTES:
        return False
    parameter = name.rpartition(".")[2]
    if role.kind is Kind.BIAS:
        return len(shape) > 1 or parameter not in ("bias", "beta")
    return role.kind is Kind.OTHER and parameter != "weight"
