"""Layers that ops are timed on: shapes by the names of models, and the arguments of all ops."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.harness import weights
from pymerge.backends.runner import Runner
from pymerge.ops import gradient_flow
from pymerge.ops._bitmask import TaskMasks
from pymerge.ops.magnitude_mask import MagnitudeMask
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.routed.task_storage import DenseTasks
from pymerge.ops.trim_threshold import Thresholds, TrimThreshold

TIME = 300.0  # of gradient flow
SAMPLES, TOKENS = 4, 197  # of routed_linear: images of a ViT-B/16
DENSITY, EPSILON = 0.5, 0.15  # of sparse task vectors


@dataclass(frozen=True)
class Size:
    """d_out x d_in and number of tasks."""

    d_out: int
    d_in: int
    tasks: int

    @property
    def numel(self) -> int:
        """Elements of one weight."""
        return self.d_out * self.d_in

    @property
    def product(self) -> int:
        """Operations of one d_out x d_in x d_in product."""
        return 2 * self.d_out * self.d_in**2

    @property
    def small(self) -> int:
        """The shorter side."""
        return min(self.d_out, self.d_in)

    @property
    def k(self) -> int:
        """ACE's number of directions."""
        return max(1, self.small * 3 // 10)

    @property
    def system(self) -> int:
        """Bytes of A, of B and of a result like B, in float32."""
        return 4 * (self.d_in**2 + 2 * self.numel)


# Names of shapes. The part before the first dash is a model: --shape takes it, too.
SHAPES = {
    "small-attn": Size(64, 64, 5),  # systems that kernels of ours solve whole
    "glyphs-attn": Size(128, 128, 5),
    "vitb-attn": Size(768, 768, 8),
    "vitb-up": Size(3072, 768, 8),
    "vitb-down": Size(768, 3072, 8),
    "llama1b-attn": Size(2048, 2048, 3),
    "llama1b-up": Size(8192, 2048, 3),
    "llama1b-down": Size(2048, 8192, 3),
    "llama8b-attn": Size(4096, 4096, 3),
    "llama8b-up": Size(14336, 4096, 3),
    "llama8b-down": Size(4096, 14336, 3),
    "llama70b-attn": Size(8192, 8192, 3),
    "llama70b-up": Size(28672, 8192, 3),
    "llama70b-down": Size(8192, 28672, 3),
}


class Layer:
    """The arguments of all ops on one layer, made when first asked for."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        self.size, self.dtype, self.device = size, dtype, device

    @cached_property
    def weights(self) -> tuple[Tensor, list[Tensor]]:
        """Base and experts."""
        return weights.layer(self.size.d_out, self.size.d_in, self.size.tasks, self.dtype, self.device)

    @property
    def base(self) -> Tensor:
        """W_0."""
        return self.weights[0]

    @property
    def experts(self) -> list[Tensor]:
        """W_t."""
        return self.weights[1]

    @cached_property
    def shares(self) -> list[float]:
        """1 / n_t, the weights of the interference loss."""
        return [1.0 / float((expert.double() - self.base.double()).square().sum()) for expert in self.experts]

    @cached_property
    def start(self) -> Tensor:
        """X_0 = sum_t tau_t in float32, where WUDI starts."""
        total = torch.zeros_like(self.base, dtype=torch.float32)
        for expert in self.experts:
            total += expert.float() - self.base.float()
        return total

    @cached_property
    def equations(self) -> tuple[Tensor, Tensor]:
        """(A, B) relative to the start, float32."""
        run = Runner("auto", self.device)
        A, B = run(NormalEquations(self.base, self.experts, self.shares, origin=self.start))
        return A, B

    @cached_property
    def regular(self) -> Tensor:
        """A with a ridge of 1 % of its mean diagonal: well-conditioned, as ACE's systems are."""
        A = self.equations[0]
        return A + 1e-2 * A.diagonal().mean() * torch.eye(len(A), device=self.device)

    @cached_property
    def routed(self) -> tuple[Tensor, Tensor, Tensor, DenseTasks]:
        """Inputs and gates of a batch of samples, W_0 in float32, and the task vectors in bfloat16."""
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(SAMPLES, TOKENS, self.size.d_in, generator=generator).to(self.device)
        gates = 0.3 + 0.1 * torch.randn(SAMPLES, self.size.tasks, generator=generator).to(self.device)
        taus = torch.stack([(expert.float() - self.base.float()).bfloat16() for expert in self.experts])
        return x, gates, self.base.float(), DenseTasks(taus)

    @property
    def mixed(self) -> tuple[Tensor, DenseTasks, Tensor]:
        """W_0, the task vectors, and the gates of all samples."""
        _, gates, weight, tasks = self.routed
        return weight, tasks, gates

    @cached_property
    def counts(self) -> list[int]:
        """How many elements of each task vector are kept."""
        return [int(DENSITY * self.size.numel)] * self.size.tasks

    @cached_property
    def thresholds(self) -> Thresholds:
        """Where they end."""
        return Runner("auto", self.device)(TrimThreshold(self.base, self.experts, self.counts))

    @cached_property
    def masks(self) -> TaskMasks:
        """Which they are."""
        return Runner("auto", self.device)(MagnitudeMask(self.base, self.experts, self.thresholds))

    @cached_property
    def flow_flops(self) -> int:
        """Operations of the cheaper way to evaluate gradient flow on this A."""
        scale = gradient_flow.largest_eigenvalue(self.equations[0]) * TIME
        return gradient_flow.schedule(self.size.d_out, self.size.d_in, scale).flops
