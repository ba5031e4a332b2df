"""Weights of a linear layer mixed by gates: W_0 + sum_t g_kt tau_t, for layers that use them more than once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.common.dtypes import code_of, torch_dtype
from pymerge.errors import ArgumentError
from pymerge.ops._op import Op, check_out_dtype, compute_dtype
from pymerge.ops.routed.task_storage import Tasks, check_gates, check_layer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class MixWeights(Op["Tensor"]):
    """W_0 + sum_t g_kt tau_t for each row k of the gates, K x d_out x d_in, contiguous.

    In float32 (float64 if W_0 or gates are), rounded once at the end. Not differentiable: `routed_linear` is. Source:
    WEMoE, arXiv 2402.00433, equation 6.
    """

    summary = "weights of a linear layer mixed from task vectors, for each row of gates"

    weight: Tensor  # W_0, d_out x d_in
    tasks: Tasks  # the task vectors as they are stored
    gates: Tensor  # K x T
    out_dtype: str | None = None  # code of the result's dtype; default: that of W_0

    def check(self) -> None:
        """Raise ArgumentError unless shapes and devices agree and dtypes are floating point."""
        check_layer("mix_weights", self.tasks, self.weight)
        check_gates("mix_weights", self.tasks, self.gates)
        for label, tensor in (("weight", self.weight), ("gates", self.gates)):
            if not tensor.is_floating_point():
                raise ArgumentError(f"mix_weights: {label} has dtype {tensor.dtype}; give floating point")
        if self.gates.device != self.weight.device:
            raise ArgumentError(
                f"mix_weights: gates are on {self.gates.device}, weight on {self.weight.device}; move one"
            )
        check_out_dtype("mix_weights", self.out_dtype)

    def reference(self) -> Tensor:
        """Mix one row of the gates after the other."""
        mixed = self.room()
        for out, gate in zip(mixed, self.gates.to(compute_dtype(self.weight, self.gates)), strict=True):
            self.tasks.mix(out, self.weight, gate, slice(None))
        return mixed

    def room(self) -> Tensor:
        """Memory for the result."""
        import torch

        dtype = self.weight.dtype if self.out_dtype is None else torch_dtype(code_of(self.out_dtype))
        return torch.empty(len(self.gates), *self.weight.shape, dtype=dtype, device=self.weight.device)
