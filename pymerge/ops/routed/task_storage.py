"""T task vectors of one linear weight (d_out x d_in) in memory: dense, sparse, or as low-rank factors.

Each form offers the passes that `routed_linear` is made of, in plain PyTorch; rows are output rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pymerge.errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Columns up to here are stored as uint16.
NARROW_COLUMNS = 2**16


@dataclass(frozen=True)
class DenseTasks:
    """Task vectors as they are: `values` is T x d_out x d_in, any floating dtype."""

    values: Tensor

    @property
    def count(self) -> int:
        """T."""
        return self.values.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.values.shape[1], self.values.shape[2]

    @property
    def entries(self) -> int:
        """Multiply-adds for one token and all tasks, when nothing is merged."""
        return self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored values."""
        return self.values.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors, by field."""
        return {"values": self.values}

    def mix(self, out: Tensor, weight: Tensor, gates: Tensor, rows: slice) -> None:
        """Write (W_0 + sum_t g_t tau_t)[rows] to `out`; gates (T) are in the dtype that is computed in."""
        total = weight[rows].to(gates.dtype, copy=True)
        for task in range(self.count):
            total.addcmul_(self.values[task, rows].to(gates.dtype), gates[task])
        out.copy_(total)

    def dots(self, delta: Tensor, rows: slice) -> Tensor:
        """<delta, tau_t[rows]> for each task, in delta's dtype."""
        import torch

        return torch.stack([(self.values[task, rows].to(delta.dtype) * delta).sum() for task in range(self.count)])

    def add_products(self, y: Tensor, x: Tensor, gates: Tensor) -> None:
        """y (N x d_out) += sum_t g_nt x tau_t^T for x (N x d_in) and gates (N x T)."""
        for task in range(self.count):
            y += (x * gates[:, task, None].to(x.dtype)) @ self.values[task].to(x.dtype).mT

    def dense(self, task: int) -> Tensor:
        """tau_t as a matrix."""
        return self.values[task]

    def transposed(self) -> DenseTasks:
        """The task vectors of the transposed weight."""
        return DenseTasks(self.values.mT.contiguous())


@dataclass(frozen=True)
class SparseTasks:
    """Nonzero entries of T task vectors, task after task and row after row.

    `values` and `columns` (uint16, or int32 if d_in exceeds 65,536) have one element an entry; entries of row r of
    task t are starts[t d_out + r] to starts[t d_out + r + 1]; `starts` is int64.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_parts(cls, parts: Sequence[tuple[Tensor, Tensor, Tensor]], shape: tuple[int, int]) -> SparseTasks:
        """From (values, columns, entries in each row) of each task."""
        import torch

        index = torch.uint16 if shape[1] <= NARROW_COLUMNS else torch.int32
        counts = torch.cat([part[2] for part in parts])
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int64)
        values = torch.cat([part[0] for part in parts])
        return cls(values, torch.cat([part[1] for part in parts]).to(index), starts, shape)

    @property
    def count(self) -> int:
        """T."""
        return (self.starts.numel() - 1) // max(self.shape[0], 1)

    @property
    def entries(self) -> int:
        """Multiply-adds for one token and all tasks, when nothing is merged."""
        return self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored values."""
        return self.values.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors, by field."""
        return {"values": self.values, "columns": self.columns, "starts": self.starts}

    def _entries(self, task: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(row within the slice, column, value) of one task's entries."""
        import torch

        first, last, _ = rows.indices(self.shape[0])
        starts = self.starts[task * self.shape[0] + first : task * self.shape[0] + last + 1]
        begin, end = int(starts[0]), int(starts[-1])
        row = torch.repeat_interleave(torch.arange(last - first, device=starts.device), starts.diff())
        return row, self.columns[begin:end].to(torch.int64), self.values[begin:end]

    def mix(self, out: Tensor, weight: Tensor, gates: Tensor, rows: slice) -> None:
        """Write (W_0 + sum_t g_t tau_t)[rows] to `out`; gates (T) are in the dtype that is computed in."""
        total = weight[rows].to(gates.dtype, copy=True)
        for task in range(self.count):
            row, column, value = self._entries(task, rows)
            total[row, column] += gates[task] * value.to(gates.dtype)
        out.copy_(total)

    def dots(self, delta: Tensor, rows: slice) -> Tensor:
        """<delta, tau_t[rows]> for each task, in delta's dtype."""
        import torch

        found = []
        for task in range(self.count):
            row, column, value = self._entries(task, rows)
            found.append((delta[row, column] * value.to(delta.dtype)).sum())
        return torch.stack(found)

    def add_products(self, y: Tensor, x: Tensor, gates: Tensor) -> None:
        """y (N x d_out) += sum_t g_nt x tau_t^T for x (N x d_in) and gates (N x T)."""
        for task in range(self.count):
            row, column, value = self._entries(task, slice(None))
            product = x[:, column] * value.to(x.dtype) * gates[:, task, None].to(x.dtype)
            y.index_add_(1, row, product)

    def dense(self, task: int) -> Tensor:
        """tau_t as a matrix."""
        import torch

        row, column, value = self._entries(task, slice(None))
        matrix = torch.zeros(self.shape, dtype=value.dtype, device=value.device)
        matrix[row, column] = value
        return matrix

    def transposed(self) -> SparseTasks:
        """The task vectors of the transposed weight."""
        import torch

        parts = []
        for task in range(self.count):
            row, column, value = self._entries(task, slice(None))
            order = torch.argsort(column, stable=True)
            parts.append((value[order], row[order], torch.bincount(column, minlength=self.shape[1])))
        return SparseTasks.from_parts(parts, (self.shape[1], self.shape[0]))


@dataclass(frozen=True)
class LowRankTasks:
    """tau_t = sum of left[:, j] right[j] over the j that task t owns.

    left is d_out x R, right R x d_in, owners (int64) R.
    """

    left: Tensor
    right: Tensor
    owners: Tensor
    count: int

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.left.shape[0], self.right.shape[1]

    @property
    def entries(self) -> int:
        """Multiply-adds for one token and all tasks, when nothing is merged."""
        return self.left.numel() + self.right.numel()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored values."""
        return self.left.dtype

    def tensors(self) -> dict[str, Tensor]:
        """Stored tensors, by field."""
        return {"left": self.left, "right": self.right, "owners": self.owners}

    def mix(self, out: Tensor, weight: Tensor, gates: Tensor, rows: slice) -> None:
        """Write (W_0 + sum_t g_t tau_t)[rows] to `out`; gates (T) are in the dtype that is computed in."""
        import torch

        left = self.left[rows].to(gates.dtype) * gates[self.owners]
        out.copy_(torch.addmm(weight[rows].to(gates.dtype), left, self.right.to(gates.dtype)))

    def dots(self, delta: Tensor, rows: slice) -> Tensor:
        """<delta, tau_t[rows]> for each task, in delta's dtype."""
        single = ((self.left[rows].to(delta.dtype).mT @ delta) * self.right.to(delta.dtype)).sum(1)
        return single.new_zeros(self.count).index_add_(0, self.owners, single)

    def add_products(self, y: Tensor, x: Tensor, gates: Tensor) -> None:
        """y (N x d_out) += sum_t g_nt x tau_t^T for x (N x d_in) and gates (N x T)."""
        thin = (x @ self.right.to(x.dtype).mT) * gates[:, self.owners].to(x.dtype)
        y.addmm_(thin, self.left.to(x.dtype).mT)

    def dense(self, task: int) -> Tensor:
        """tau_t as a matrix."""
        mine = self.owners == task
        return self.left[:, mine] @ self.right[mine]

    def transposed(self) -> LowRankTasks:
        """The task vectors of the transposed weight."""
        return LowRankTasks(self.right.mT.contiguous(), self.left.mT.contiguous(), self.owners, self.count)


Tasks = DenseTasks | SparseTasks | LowRankTasks


def check_layer(
    op: str, tasks: Tasks, weight: Tensor, bias: Tensor | None = None, bias_tasks: Tensor | None = None
) -> None:
    """Raise ArgumentError unless W_0, b_0 and the task vectors of the bias have the shapes of the task vectors."""
    d_out, d_in = tasks.shape
    expected = {
        "weight": (weight, (d_out, d_in)),
        "bias": (bias, (d_out,)),
        "bias_tasks": (bias_tasks, (tasks.count, d_out)),
    }
    for label, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ArgumentError(
                f"{op}: {label} has shape {tuple(tensor.shape)}, the task vectors need {shape}; give those of one layer"
            )


def check_gates(op: str, tasks: Tasks, gates: Tensor) -> None:
    """Raise ArgumentError unless the gates are a matrix with one column for each task."""
    if gates.ndim != 2 or gates.shape[1] != tasks.count:
        raise ArgumentError(
            f"{op}: gates have shape {tuple(gates.shape)}, expected samples x {tasks.count}; give one for each expert"
        )
