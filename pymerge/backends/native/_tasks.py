"""Task vectors of one linear weight as csrc/bindings takes them, and the threads that passes over them are worth."""

from __future__ import annotations

from pymerge.common.arrays import dtype_of
from pymerge.common.dtypes import NATIVE
from pymerge.ops.routed.task_storage import DenseTasks, SparseTasks, Tasks

Dense = tuple[int, int, int, int]
Sparse = tuple[int, int, int, bool, int, int, int]

# Multiply-adds that are worth a thread of their own: a panel's pass is short, and waiting for a second thread on a busy
# machine costs more than it saves. An entry found by its index counts as several.
_WORK = 2**21
_SCATTERED = 8


def pass_threads(tasks: Tasks, rows: int, most: int) -> int:
    """Threads, no more than `most`, for a pass over `rows` rows of all task vectors."""
    work = tasks.entries * rows // max(tasks.shape[0], 1) * (_SCATTERED if isinstance(tasks, SparseTasks) else 1)
    return max(1, min(most, work // _WORK))


def dense(tasks: DenseTasks, rows: slice = slice(None)) -> Dense:
    """Dense task vectors from the first of some rows on: (address, dtype, elements between two tasks, T)."""
    values = tasks.values
    first = rows.indices(values.shape[1])[0]
    address = values.data_ptr() + first * values.shape[2] * values.element_size()
    return address, NATIVE[dtype_of(values)], values.stride(0), values.shape[0]


def sparse(tasks: SparseTasks, rows: slice = slice(None)) -> Sparse:
    """Sparse task vectors from the first of some rows on.

    (values, their dtype, columns, whether those are int32, starts, starts between two tasks, T).
    """
    first = rows.indices(tasks.shape[0])[0]
    return (
        tasks.values.data_ptr(),
        NATIVE[dtype_of(tasks.values)],
        tasks.columns.data_ptr(),
        tasks.columns.element_size() == 4,
        tasks.starts.data_ptr() + first * tasks.starts.element_size(),
        tasks.shape[0],
        tasks.count,
    )
