"""Files of task vectors before any tensor is read: what each holds, and its size, as far as headers tell it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES, code_of
from pymerge.ops.routed.task_storage import NARROW_COLUMNS
from pymerge.output.layout import ShardLayout, layout_file
from pymerge.wemoe.spec import StorageSpec
from pymerge.wemoe.task_vectors import TASKS_PREFIX, matrix_shape

# Of a dense task vector, computed at a time: the float32 forms of that many elements stay in the cache.
CHUNK_ELEMENTS = 2**17

Described = tuple[str, str, tuple[int, ...]]  # name, dtype code, shape


@dataclass(frozen=True)
class StoredParameter:
    """One parameter that is mixed, W_0 and W_t, and the tensors that its task vectors are stored as.

    `stored` are as `pymerge.wemoe.task_vectors.encode` gives them; pruned entries, and ranks by energy, are the most
    there can be.
    """

    name: str
    shape: tuple[int, ...]
    base: TensorEntry
    experts: tuple[TensorEntry, ...]
    storage: StorageSpec

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dense(self) -> bool:
        """Whether task vectors are stored as they are, rounded: biases are, beside low-rank weights."""
        return self.storage.kind == "dense" or (self.storage.kind == "low_rank" and len(self.shape) == 1)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all task vectors, dense."""
        return len(self.experts) * self.numel * self.storage.torch_dtype.itemsize

    @cached_property
    def stored(self) -> list[Described]:
        tasks, code = len(self.experts), code_of(self.storage.torch_dtype)
        rows, columns = matrix_shape(self.shape)
        if self.storage.kind == "pruned":
            kept = tasks * self._kept
            narrow = "U16" if columns <= NARROW_COLUMNS else "I32"
            found = [("values", code, (kept,)), ("columns", narrow, (kept,)), ("counts", "I32", (tasks, rows))]
        elif not self.dense:
            rank = min(rows, columns, self.storage.rank or min(rows, columns))
            total = tasks * rank
            found = [("left", code, (rows, total)), ("right", code, (total, columns)), ("ranks", "I32", (tasks,))]
        else:
            found = [("values", code, (tasks, *self.shape))]
        return [(f"{self.name}::{field}", dtype, shape) for field, dtype, shape in found]

    @property
    def _kept(self) -> int:
        """Entries of one task above the quantile; fewer where some are equal to it."""
        ratio = self.storage.ratio or 0.0
        return max(0, self.numel - 1 - math.floor(ratio * (self.numel - 1)))

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of its stored tensors, at most."""
        return sum(math.prod(shape) * ITEM_SIZES[dtype] for _, dtype, shape in self.stored)

    @cached_property
    def scratch(self) -> int:
        """Bytes that it takes to compute one task after the other, beside inputs and results."""
        n, item = self.numel, 8 if self.base.dtype == "F64" else 4
        if self.dense:
            return 3 * item * min(n, CHUNK_ELEMENTS)
        tau = 3 * item * n  # W_t and W_0 upcast, and their difference
        if self.storage.kind == "pruned":
            # Magnitudes and their copy for the selection; then a mask, and the entries with their places as int64.
            work = max(2 * item * n, n + (40 + item) * self._kept)
        else:
            rows, columns = matrix_shape(self.shape)
            small = min(rows, columns)
            # float64: two copies of tau, both factors twice, and what LAPACK's divide and conquer takes.
            work = 8 * (2 * n + 2 * small * (rows + columns) + 5 * small * small + 16 * small)
        return max(tau, item * n + work) + self.stored_bytes  # results of each task, which are joined


@dataclass(frozen=True)
class TaskVectorFile:
    """One file; `exact` if its sizes are known from headers. Others are held in memory until they are whole."""

    file: str
    parameters: tuple[StoredParameter, ...]

    @property
    def exact(self) -> bool:
        storage = self.parameters[0].storage
        return storage.kind == "dense" or storage.rank is not None

    @cached_property
    def layout(self) -> ShardLayout:
        """Layout of an exact file."""
        return layout_file(self.file, [tensor for parameter in self.parameters for tensor in parameter.stored])

    @property
    def reserve(self) -> int:
        """Bytes of disk to set aside: the most there can be, but no more than dense where energy decides the ranks."""
        return sum(
            parameter.stored_bytes
            if parameter.storage.energy is None
            else min(parameter.stored_bytes, parameter.dense_bytes)
            for parameter in self.parameters
        )


def task_vector_files(parameters: Iterable[StoredParameter], max_bytes: int) -> list[TaskVectorFile]:
    """Parameters in their order, in files of at most `max_bytes` (one parameter at least)."""
    groups: list[list[StoredParameter]] = []
    used = 0
    for parameter in parameters:
        if not groups or used + parameter.stored_bytes > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(parameter)
        used += parameter.stored_bytes
    return [
        TaskVectorFile(f"{TASKS_PREFIX}-{number:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    ]


def weight_map(layouts: Sequence[ShardLayout]) -> dict[str, str]:
    """File of each tensor."""
    return {tensor.name: layout.file for layout in layouts for tensor in layout.tensors}
