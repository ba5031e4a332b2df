"""Inputs for tests and benchmarks: shapes, dtypes, and task vectors that look like fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pymerge.backends.runner import BACKENDS, implemented, load
from pymerge.common.devices import Device

# (d_out, d_in) and the paths they reach.
SHAPES = (
    (0, 5),  # no rows: sums over nothing
    (5, 0),  # no columns: empty results
    (1, 1),
    (1, 70),  # one row: the column mean is the row, centred task vectors are 0
    (70, 1),  # one column: row strides and column strides coincide
    (63, 65),  # one off the tiles of the kernels on both sides
    (300, 48),  # tall: several groups of rows, B from Grams
    (40, 200),  # wide: several tiles, an even number of tile rows, B from outputs first
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

LAYOUTS = ("contiguous", "row slice", "transposed", "every other column")


@dataclass(frozen=True)
class TaskCase:
    """A base (d_out x d_in) and T experts fine-tuned from it."""

    base: Tensor
    experts: list[Tensor]

    def to(self, dtype: torch.dtype) -> TaskCase:
        """This case in another dtype, contiguous."""
        return TaskCase(self.base.to(dtype).contiguous(), [expert.to(dtype).contiguous() for expert in self.experts])


def task_case(
    shape: tuple[int, int],
    dtypes: Sequence[torch.dtype],
    *,
    device: torch.device | str = "cpu",
    layout: str = "contiguous",
    seed: int = 0,
) -> TaskCase:
    """A base in dtypes[0] and one expert in each further dtype, all laid out in memory as `layout` says.

    Task vectors are 1 % of the weights, of low rank plus noise, with a column mean that is not 0.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    base = 0.05 * normal(rows, columns)
    experts = [
        base + 5e-4 * (normal(rows, 4) @ normal(4, columns) / 2 + 0.3 * normal(rows, columns) + 0.2 * normal(columns))
        for _ in dtypes[1:]
    ]
    base, *experts = [
        lay_out(tensor.to(device=device, dtype=dtype), layout)
        for tensor, dtype in zip([base, *experts], dtypes, strict=True)
    ]
    return TaskCase(base, experts)


def make_weights(
    d_out: int,
    d_in: int,
    tasks: int,
    *,
    rank: int | None = None,
    rms: float = 5e-4,
    spread: float = 0.3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """W_0 (d_out x d_in, std 0.02) and experts whose deltas have a decaying spectrum of the given rank, for solvers.

    The rms of the deltas grows by `spread` a task. Seeded by the shape and `seed`; computed in float64 and rounded to
    `dtype`.
    """
    generator = torch.Generator().manual_seed(hash((d_out, d_in, tasks, rank or 0, seed)) % 2**31)
    base = 0.02 * torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    experts = []
    for task in range(tasks):
        k = rank or min(d_out, d_in)
        left = torch.randn(d_out, k, generator=generator, dtype=torch.float64)
        right = torch.randn(k, d_in, generator=generator, dtype=torch.float64)
        delta = (left / torch.arange(1, k + 1)) @ right
        scale = rms * (1.0 + spread * task) / float(delta.square().mean().sqrt())
        experts.append((base + scale * delta).to(dtype))
    return base.to(dtype), experts


def lay_out(matrix: Tensor, layout: str) -> Tensor:
    """A matrix of the same values with other strides; what lies between its elements is NaN."""
    rows, columns = matrix.shape
    if layout == "contiguous":
        return matrix.contiguous()
    if layout == "transposed":
        return matrix.mT.contiguous().mT
    if layout == "row slice":
        view = matrix.new_full((rows, columns + 3), float("nan"))[:, 1 : columns + 1]
    elif layout == "every other column":
        view = matrix.new_full((rows, 2 * columns), float("nan"))[:, ::2]
    else:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    return view.copy_(matrix)


def implementations(op: str) -> list[tuple[str, str]]:
    """(backend, device) of every compiled implementation of an op that can run here."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        (name, device)
        for name in BACKENDS
        for device in devices
        if name != "reference" and load(name).unavailable(Device(device)) is None and op in implemented(name)
    ]
