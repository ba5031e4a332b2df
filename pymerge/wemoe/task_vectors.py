"""wemoe-task-vectors-*.safetensors: task vectors as stored tensors and back, written one parameter at a time.

A parameter NAME has tensors NAME::values and, by kind, others: see `encode`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pymerge.checkpoint.checkpoint import TensorEntry, read_header
from pymerge.common.files import atomic_write, fsync_directory
from pymerge.errors import ArgumentError, CheckpointError
from pymerge.ops.routed.compress import low_rank_tasks, pruned_tasks, sparse_tasks
from pymerge.ops.routed.task_storage import NARROW_COLUMNS, DenseTasks, LowRankTasks, SparseTasks, Tasks
from pymerge.wemoe.spec import StorageSpec

TASKS_PREFIX = "wemoe-task-vectors"
INDEX_NAME = f"{TASKS_PREFIX}.safetensors.index.json"
_AGAIN = "build the directory again"


def compress(taus: Sequence[Tensor], storage: StorageSpec) -> Tasks | Tensor:
    """T task vectors of one parameter (float32 or wider) in the form they are kept in.

    Tasks for those of a weight, as a matrix; T x n for those of a bias (1-D), pruned if weights are, never low-rank.
    """
    dtype, matrix = storage.torch_dtype, taus[0].ndim > 1
    if matrix:
        taus = [tau.flatten(1) for tau in taus]
    if storage.kind == "pruned" and storage.ratio is not None:
        sparse = pruned_tasks([tau if matrix else tau[None] for tau in taus], storage.ratio, dtype)
        return sparse if matrix else torch.cat([sparse.dense(task) for task in range(len(taus))])
    if storage.kind == "low_rank" and matrix:
        return low_rank_tasks(taus, dtype, rank=storage.rank, energy=storage.energy)
    values = torch.stack([tau.to(dtype) for tau in taus])
    return DenseTasks(values) if matrix else values


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a parameter as a matrix: all axes but the first are columns; a bias is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape[0])


def encode(name: str, shape: Sequence[int], vectors: Tasks | Tensor, storage: StorageSpec) -> dict[str, Tensor]:
    """The stored tensors of one parameter of this shape, from what `compress` gives.

    dense: `values` [T, *shape]. pruned: `values` and `columns` (uint16; int32 above 65,536 columns) of the entries
    kept, task after task and row after row, and `counts` (int32, [T, rows]) of entries in each row; a bias is one row.
    low_rank: `left` [rows, R], `right` [R, columns] and `ranks` (int32, [T]); a bias is dense.
    """
    if isinstance(vectors, Tensor) and storage.kind == "pruned":
        rows = [vector[None] for vector in vectors]
        vectors = sparse_tasks(rows, [row != 0 for row in rows], storage.torch_dtype)
    if isinstance(vectors, SparseTasks):
        counts = vectors.starts.diff().view(vectors.count, -1).to(torch.int32)
        found = {"values": vectors.values, "columns": vectors.columns, "counts": counts}
    elif isinstance(vectors, LowRankTasks):
        ranks = torch.bincount(vectors.owners, minlength=vectors.count).to(torch.int32)
        found = {"left": vectors.left, "right": vectors.right, "ranks": ranks}
    else:
        values = vectors.values if isinstance(vectors, DenseTasks) else vectors
        found = {"values": values.view(-1, *shape)}
    return {f"{name}::{field}": tensor.contiguous() for field, tensor in found.items()}


def decode(
    name: str, shape: Sequence[int], tasks: int, storage: StorageSpec, stored: TaskVectorFiles
) -> Tasks | Tensor:
    """Task vectors of one parameter: Tasks of a weight, [T, n] of a bias. Raises CheckpointError if they don't fit."""
    matrix = matrix_shape(shape)
    dtype = storage.torch_dtype
    if storage.kind == "pruned":
        counts = stored.take(f"{name}::counts", torch.int32, (tasks, matrix[0])).to(torch.int64).flatten()
        total = int(counts.sum())
        if bool((counts < 0).any()) or bool((counts > matrix[1]).any()):
            raise stored.error(f"{name}::counts", f"has counts outside 0 to {matrix[1]}")
        values = stored.take(f"{name}::values", dtype, (total,))
        narrow = torch.uint16 if matrix[1] <= NARROW_COLUMNS else torch.int32
        columns = stored.take(f"{name}::columns", narrow, (total,))
        # C++ writes where they point: nothing may point outside.
        wide = columns.to(torch.int64)
        if total and not 0 <= int(wide.min()) <= int(wide.max()) < matrix[1]:
            raise stored.error(f"{name}::columns", f"points outside the {matrix[1]} columns")
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        sparse = SparseTasks(values, columns, starts, matrix)
        return sparse if len(shape) > 1 else torch.cat([sparse.dense(task) for task in range(tasks)])
    if storage.kind == "low_rank" and len(shape) > 1:
        ranks = stored.take(f"{name}::ranks", torch.int32, (tasks,)).to(torch.int64)
        if bool((ranks < 0).any()) or bool((ranks > min(matrix)).any()):
            raise stored.error(f"{name}::ranks", f"has ranks outside 0 to {min(matrix)}")
        total = int(ranks.sum())
        left = stored.take(f"{name}::left", dtype, (matrix[0], total))
        right = stored.take(f"{name}::right", dtype, (total, matrix[1]))
        owners = torch.repeat_interleave(torch.arange(tasks), ranks)
        return LowRankTasks(left, right, owners, tasks)
    values = stored.take(f"{name}::values", dtype, (tasks, *shape))
    return DenseTasks(values.flatten(2)) if len(shape) > 1 else values


def index_bytes(weight_map: Mapping[str, str], nbytes: int) -> bytes:
    """The content of the index: tensor -> file, and bytes of all tensors."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(weight_map)}
    return (json.dumps(index, indent=1) + "\n").encode()


class TaskVectorWriter:
    """Writes stored tensors, parameter by parameter, into shards of at most `max_bytes` (one parameter at least).

    Memory holds one shard. A shard appears under its name when it is whole; the index, written by `close`, comes
    last. Raises OutputError or ArgumentError.
    """

    def __init__(self, folder: Path | str, max_bytes: int = 1 << 30) -> None:
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.stored_bytes = 0
        self._weight_map: dict[str, str] = {}
        self._waiting: dict[str, Tensor] = {}
        self._shards = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add the tensors of one parameter, as `encode` gives them."""
        repeated = [name for name in tensors if name in self._weight_map or name in self._waiting]
        if repeated:
            raise ArgumentError(f"{self.folder}: tensor {repeated[0]!r} was added before; add each parameter once")
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._waiting and size + sum(tensor.nbytes for tensor in self._waiting.values()) > self.max_bytes:
            self._flush()
        self._waiting |= {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self.stored_bytes += size

    def close(self) -> None:
        """Write the last shard and the index."""
        self._flush()
        atomic_write(self.folder / INDEX_NAME, index_bytes(self._weight_map, self.stored_bytes))

    def _flush(self) -> None:
        if not self._waiting:
            return
        self._shards += 1
        file = f"{TASKS_PREFIX}-{self._shards:05d}.safetensors"
        temporary = self.folder / f".{file}.tmp"
        save_file(self._waiting, temporary, {"format": "pt"})
        os.replace(temporary, self.folder / file)
        fsync_directory(self.folder)
        self._weight_map |= dict.fromkeys(self._waiting, file)
        self._waiting = {}


class TaskVectorFiles:
    """The stored tensors of a directory, found by their headers and read one by one."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._taken: set[str] = set()
        index = self.folder / INDEX_NAME
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            files = sorted({file for file in weight_map.values() if Path(file).name == file})
        except OSError as error:
            raise CheckpointError(f"{index}: cannot be read ({error.strerror}); {_AGAIN}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: is not an index of safetensors files ({error!r}); {_AGAIN}") from error
        self._entries: dict[str, TensorEntry] = {}
        for file in files:
            self._entries |= read_header(self.folder / file).entries
        if set(self._entries) != set(weight_map):
            odd = sorted(set(self._entries) ^ set(weight_map))[0]
            raise CheckpointError(f"{index}: tensor {odd!r} is in the index or in the files but not in both; {_AGAIN}")

    def take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A tensor of exactly this dtype and shape. Raises CheckpointError otherwise."""
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"{self.folder / INDEX_NAME}: tensor {name!r} is missing; {_AGAIN}")
        if entry.shape != shape:
            raise self.error(name, f"has shape {list(entry.shape)}, wemoe.json says {list(shape)}")
        with safe_open(entry.file, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        if tensor.dtype != dtype:
            raise self.error(name, f"is {tensor.dtype}, wemoe.json says {dtype}")
        self._taken.add(name)
        return tensor

    def error(self, name: str, problem: str) -> CheckpointError:
        """An error about a tensor."""
        return CheckpointError(f"{self._entries[name].file}: tensor {name!r} {problem}; {_AGAIN}")

    def check_all_taken(self) -> None:
        """Raise CheckpointError if a tensor belongs to no module of wemoe.json."""
        left = sorted(set(self._entries) - self._taken)
        if left:
            raise self.error(left[0], "belongs to no module of wemoe.json")
