"""Jobs of a build: the steps that make task vectors and routers, for the executor of the merge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pymerge.architecture.roles import Kind, Role
from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.finite import check_finite, is_finite
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.errors import NonFiniteError
from pymerge.methods.actions import Encode
from pymerge.ops._op import compute_dtype, task_vector
from pymerge.planner.pieces import Piece
from pymerge.planner.steps import Step
from pymerge.wemoe.router import make_router
from pymerge.wemoe.router_file import ROUTER_NAME, described_routers, one_routers_tensors
from pymerge.wemoe.spec import Spec
from pymerge.wemoe.task_vector_layout import CHUNK_ELEMENTS, StoredParameter, TaskVectorFile
from pymerge.wemoe.task_vectors import compress, encode

# The axis along which the tasks of a stored tensor are joined: `left` holds columns of factors.
_COLUMNS = "left"


@dataclass(frozen=True)
class StoreTaskVectors(Encode):
    """The task vectors of one parameter as they are stored, from W_0 and all W_t."""

    parameter: StoredParameter
    label: ClassVar[str] = "task vectors"

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        """Differences alone; what compresses them depends on the storage."""
        return experts * self.parameter.numel

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        return self.parameter.scratch

    def run(self, inputs: Sequence[Tensor], first_row: int) -> dict[str, Tensor]:
        base, *experts = inputs
        tasks = list(zip(self.parameter.experts, experts, strict=True))
        if self.parameter.dense:
            return self._dense(base, tasks)
        parts = [self._compressed(base, entry, expert) for entry, expert in tasks]
        return {
            name: torch.cat([part[name] for part in parts], 1 if name.endswith(f"::{_COLUMNS}") else 0)
            for name in parts[0]
        }

    def _dense(self, base: Tensor, tasks: Sequence[tuple[TensorEntry, Tensor]]) -> dict[str, Tensor]:
        """Task vectors as they are, rounded; by ranges of rows, whose float32 forms stay in the cache."""
        dtype = compute_dtype(base)
        values = torch.empty((len(tasks), *base.shape), dtype=self.parameter.storage.torch_dtype)
        rows = max(1, CHUNK_ELEMENTS * base.shape[0] // max(1, base.numel()))
        for task, (entry, expert) in zip(values, tasks, strict=True):
            for start in range(0, base.shape[0], rows):
                part = slice(start, start + rows)
                task[part] = task_vector(base[part], expert[part], None, dtype)
            self._check(entry, base, expert, task)
        return {f"{self.parameter.name}::values": values}

    def _compressed(self, base: Tensor, entry: TensorEntry, expert: Tensor) -> dict[str, Tensor]:
        """The stored tensors of one expert alone."""
        storage = self.parameter.storage
        tau = task_vector(base, expert, None, compute_dtype(base))
        self._check(entry, base, expert, tau)
        found = encode(self.parameter.name, self.parameter.shape, compress([tau], storage), storage)
        for tensor in found.values():
            self._check(entry, base, expert, tensor)
        return found

    def _check(self, entry: TensorEntry, base: Tensor, expert: Tensor, found: Tensor) -> None:
        """Raise NonFiniteError, with file and tensor, unless what was made of an expert is finite."""
        if is_finite(found):
            return
        for source, tensor in ((self.parameter.base, base), (entry, expert)):
            check_finite(source, 0, tensor, "use a sound checkpoint: its task vectors are mixed into every output")
        raise NonFiniteError(
            f"{entry.file}: the task vector of {entry.name!r} has values that {self.parameter.storage.dtype} cannot "
            "hold; choose storage dtype bfloat16 or float32"
        )


@dataclass(frozen=True)
class MakeRouter(Encode):
    """The parameters of a new router, from the seed alone."""

    spec: Spec
    index: int
    seed: int
    label: ClassVar[str] = "new router"

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        """None: its numbers are random."""
        return 0

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        """None: parameters are written as they are made."""
        return 0

    def run(self, inputs: Sequence[Tensor], first_row: int) -> dict[str, Tensor]:
        return one_routers_tensors(self.spec, self.index, make_router(self.spec, self.index, self.seed))


def task_vector_steps(files: Sequence[TaskVectorFile]) -> Iterator[Step]:
    """The steps that make files of task vectors, one for each parameter."""
    for file in files:
        gathered = 0
        for parameter in file.parameters:
            step = _step(parameter.base, file.file, StoreTaskVectors(parameter), parameter.stored_bytes)
            step = replace(step, name=parameter.name, experts=parameter.experts, reads_base=True)
            yield step if file.exact else replace(step, gathered=gathered)
            gathered += parameter.stored_bytes


def router_steps(spec: Spec, seed: int) -> Iterator[Step]:
    """The steps that make the routers' file, one for each router; nothing is read."""
    for index, tensors in enumerate(described_routers(spec)):
        name = tensors[0][0].rpartition("::")[0] + "::router"
        nbytes = sum(math.prod(shape) * ITEM_SIZES[dtype] for _, dtype, shape in tensors)
        nothing = TensorEntry(name, "F32", (), Path(ROUTER_NAME), 0, 0)
        yield _step(nothing, ROUTER_NAME, MakeRouter(spec, index, seed), nbytes)


def _step(entry: TensorEntry, file: str, action: Encode, nbytes: int) -> Step:
    """A step on a tensor like `entry`, which reads nothing."""
    whole = Piece(0, entry.shape[0] if entry.shape else 1, entry.shape)
    return Step(
        name=entry.name,
        role=Role(Kind.OTHER),
        action=action,
        shape=entry.shape,
        dtype=entry.dtype,
        base=entry,
        experts=(),
        reads_base=False,
        file=file,
        offset=0,
        nbytes=nbytes,
        pieces=(whole,),
        worker="encode",
    )
