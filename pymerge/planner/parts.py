"""Parts of a merge: which files each of several processes makes, by what they cost, and advice on their number."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from pymerge.common.units import count_of
from pymerge.errors import ArgumentError
from pymerge.methods.actions import Solve
from pymerge.output.layout import ShardLayout
from pymerge.planner import pieces
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step

# Operations that take as long as a byte of inputs and output: two cores solve at about 50 GFLOP/s, beside a disk of
# about 1 GB/s. A guess: it decides who does what, and no bytes.
_FLOPS_PER_BYTE = 50
# Files of each part: below the first number the plan warns, and names a size that gives the second.
_LEAST, _WANTED = 2, 4

Part = tuple[int, int]  # number, from 1 on, and how many there are


def parse_part(text: str) -> Part:
    """The part that "2/3" names. Raises ArgumentError."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None:
        raise ArgumentError(f"part {text!r:.60} is not understood; write for example 2/3, the second of three")
    return checked_part((int(found[1]), int(found[2])))


def checked_part(part: Part) -> Part:
    """The part. Raises ArgumentError unless it is one of so many."""
    number, count = part
    if not 1 <= number <= count:
        raise ArgumentError(f"part {number}/{count} does not exist; give a number from 1 to {max(1, count)}")
    return part


def assign(plan: Plan, count: int, files: Collection[str] | None = None) -> list[list[str]]:
    """The files of a plan (or some of them) in `count` parts: the costliest first, each to the part with least to do.

    It depends on what is merged alone, so that every process that plans the same merge comes to the same parts.
    """
    costs = file_costs(plan.steps, plan.files)
    parts: list[list[str]] = [[] for _ in range(count)]
    sums = [0] * count
    for file in by_cost(costs):
        if files is None or file in files:
            least = sums.index(min(sums))
            parts[least].append(file)
            sums[least] += costs[file]
    return parts


def by_cost(costs: dict[str, int]) -> list[str]:
    """Files, the costliest first; of equal ones in the order of their names."""
    return sorted(costs, key=lambda file: (-costs[file], file))


def file_costs(steps: Iterable[Step], layouts: Iterable[ShardLayout]) -> dict[str, int]:
    """Cost of each file, in bytes read and written or operations that take as long.

    Whole tensors are counted: their pieces follow from the memory of a machine.
    """
    costs = {layout.file: layout.nbytes for layout in layouts}
    for step in steps:
        solved = step.role.parts if isinstance(step.action, Solve) else 1
        worked = pieces.worked_shape(step.role, step.action, step.shape)
        flops = solved * step.action.flops(worked, len(step.experts))
        costs[step.file] += step.bytes_input + flops // _FLOPS_PER_BYTE
    return costs


def few_files(plan: Plan, count: int) -> str | None:
    """Warning where there are too few files for so many parts, with a size of files that gives more; or None."""
    if count < 2 or len(plan.files) >= _LEAST * count:
        return None
    sizes = [tensor.nbytes for layout in plan.layouts for tensor in layout.tensors]
    text = f"{count} parts share {count_of(len(plan.files), 'output file')}, each taken whole by one"
    if len(sizes) < _WANTED * count:
        return f"{text}; the merge has {count_of(len(sizes), 'tensor')}: fewer parts would do"
    size = _size_for(sizes, _WANTED * count)
    option = f"--max-shard-size {_written(size)}, given to all parts and to finalize,"
    return f"{text}; {option} would give {count_files(sizes, size)}"


def count_files(sizes: Sequence[int], limit: int) -> int:
    """Number of files that `layout_shards` makes of tensors of these sizes."""
    count, used = 1, 0
    for number, size in enumerate(sizes):
        if number and used + size > limit:
            count, used = count + 1, 0
        used += size
    return count


def _size_for(sizes: Sequence[int], wanted: int) -> int:
    """A size of files with two digits, about as large as it may be, that gives so many."""
    low, high = 1, max(1, sum(sizes))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count_files(sizes, _two_digits(middle)) >= wanted else (low, middle - 1)
    return _two_digits(low)


def _two_digits(size: int) -> int:
    unit: int = 10 ** max(0, len(str(size)) - 2)
    return size // unit * unit


def _written(size: int) -> str:
    for unit, power in (("GB", 9), ("MB", 6), ("KB", 3)):
        if size >= 10**power:
            return f"{size / 10**power:g}{unit}"
    return f"{size}B"
