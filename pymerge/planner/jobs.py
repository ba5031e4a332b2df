"""Order of the work: the pieces of a plan, pass by pass, one by one or in batches."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

from pymerge.env import usable_cpus
from pymerge.methods.actions import Solve, SolveTogether
from pymerge.planner.budget import Budget
from pymerge.planner.pieces import Piece, worked_shape
from pymerge.planner.steps import Footprint, Step

# Pieces that may be in memory before (read ahead) and after (to be written) the one that is computed.
READ_AHEAD = 2
WRITE_BEHIND = 2
# Pieces of other tensors between two passes of one, if there are so many: the first pass is all done then.
BETWEEN_PASSES = 8
# Threads that read for PyTorch, at most, by device: a file is read by several to be as fast as the way to a GPU.
READ_THREADS = {"cpu": 4, "cuda": 8}
# Pieces of a few MiB that the disk is given at once: one alone waits for its answer.
WRITE_THREADS = 4
FINISHED = ""  # no file of a plan
# Elements of the layers that are computed as one batch, by device; 0 for none. One small layer does not fill a GPU; a
# core of a CPU it does. Untimed: a guess at what a GPU takes.
BATCH_ELEMENTS = {"cpu": 0, "cuda": 16 * 2**20}
# Layers that are computed side by side, at most, on the cores of a CPU or on streams of a GPU, where the factors of one
# leave room for products of another: each takes memory of its own.
MOST_ABREAST = {"cpu": 8, "cuda": 2}


@dataclass(frozen=True)
class Job:
    """One piece in one pass, in the plan's order, with the bytes that are in memory in its turn."""

    step: Step
    piece: Piece
    footprint: Footprint
    number: int = 0  # of the pass over all pieces of the step
    ends_pass: bool = True  # no piece of this pass comes after it

    @property
    def pooled(self) -> bool:
        """Whether a thread of a pool carries it out, ahead of its turn; else it is computed in its turn."""
        return self.step.worker != "torch"

    @property
    def reduces(self) -> bool:
        """Whether it is one piece of several passes."""
        return self.step.in_passes

    @property
    def reduction(self) -> Hashable:
        """Key of the reduction that it is part of."""
        group = self.step.group
        return id(self.step) if group is None else (group.number,)

    @property
    def first(self) -> int:
        """Number of the piece's first element in its tensor, or in all tensors that are reduced together."""
        before = self.step.group.first if self.step.group else 0
        return before + self.piece.start * math.prod(self.step.shape[1:])

    @property
    def merges(self) -> bool:
        """Whether it gives a part of the result; the passes before the last one do not."""
        return self.number == self.step.passes - 1

    @property
    def reads(self) -> bool:
        """Whether the inputs are read; those of a step that are held are, in the first pass alone."""
        return self.number == 0 or not self.step.held

    @property
    def reads_last(self) -> bool:
        """Whether the inputs are not read again."""
        return self.step.held or self.merges

    @property
    def starts_step(self) -> bool:
        """Whether no piece of the step comes before it."""
        return self.number == 0 and self.piece is self.step.pieces[0]

    @property
    def ends_step(self) -> bool:
        """Whether no piece of the step comes after it."""
        return self.merges and self.piece is self.step.pieces[-1]

    def follows(self, earlier: Job) -> bool:
        """Whether it needs what a pass before it tells, of which `earlier` is a piece."""
        return self.number > earlier.number and self.reduces and self.reduction == earlier.reduction


@dataclass(frozen=True)
class Batch:
    """Jobs that are read, computed and written together: one, or some of a shard with the same action and shape."""

    jobs: tuple[Job, ...]

    @cached_property
    def footprint(self) -> Footprint:
        """Bytes that all jobs need together."""
        parts = [job.footprint for job in self.jobs]
        return Footprint(
            sum(part.inputs for part in parts), sum(part.scratch for part in parts), sum(part.output for part in parts)
        )

    @property
    def pooled(self) -> bool:
        """Whether a thread of a pool carries it out; then it is one job."""
        return self.jobs[0].pooled

    @property
    def name(self) -> str:
        """Name of the first tensor, and how many jobs are with it, for people."""
        more = len(self.jobs) - 1
        return self.jobs[0].step.name + (f" and {more} more of its shape" if more else "")


def read_threads(device: str) -> int:
    """Threads that read for PyTorch, to a device of this kind: on CUDA as many as there are cores, from 4 to 8."""
    least = READ_THREADS["cpu"]
    return least if device == "cpu" else min(READ_THREADS[device], max(least, usable_cpus()))


def jobs(steps: Iterable[Step]) -> Iterator[Job]:
    """All jobs in the order of the plan, those of a tensor pass after pass."""
    return (job for step in steps for number in range(step.passes) for job in _pass(step, number, 0))


def ordered(steps: Sequence[Step], limit: int, finished: Collection[str] = ()) -> list[Job]:
    """The jobs of a plan, passes of a tensor alternating with those of its neighbours, as far as it fits `limit` bytes.

    A pass starts when all is known of the one before. If other work lies between, nobody waits for the last piece.
    Steps of `finished` files have no jobs, but for those that tell a reduction of the whole model what it must know.
    """
    unfinished = [step for step in steps if step.file not in finished]
    found = list(_model_passes(steps, unfinished))
    alternating = list(_alternating(unfinished))
    fits = all(job.footprint.peak <= limit for job in alternating)
    return found + (alternating if fits else [job for step in unfinished for job in _own_passes(step)])


def only(steps: Iterable[Step], names: Collection[str]) -> list[Step]:
    """The steps of these tensors, for `ordered` or `batches` with `FINISHED` among the finished files. Others are there
    if a reduction of the whole model must know them."""
    return [
        step if step.name in names else replace(step, file=FINISHED)
        for step in steps
        if step.name in names or step.group is not None
    ]


def _model_passes(steps: Sequence[Step], unfinished: Sequence[Step]) -> Iterator[Job]:
    """The passes over all tensors of the model that come before any of these tensors is merged."""
    wanted = {step.group.number for step in unfinished if step.group}
    for number in sorted(wanted):
        group = [step for step in steps if step.group and step.group.number == number]
        group.sort(key=lambda step: step.group.first if step.group else 0)
        for count in range(group[0].passes - 1):
            for step in group:
                found = list(_pass(step, count, 0))
                ends = step is group[-1]
                yield from (replace(job, ends_pass=ends and job.ends_pass) for job in found)


def _own_passes(step: Step) -> Iterator[Job]:
    first = 0 if step.group is None else step.passes - 1
    return (job for number in range(first, step.passes) for job in _pass(step, number, 0))


def _alternating(steps: Sequence[Step]) -> Iterator[Job]:
    tensors = [list(together) for _, together in groupby(steps, key=lambda step: step.name)]
    known: dict[int, int] = {}  # bytes that are held for each tensor, between its passes
    for number, index in _passes(tensors):
        together = tensors[index]
        if len(together) > 1:  # rows of one tensor, which are written in their order
            others = sum(known.values())
            yield from (
                replace(job, footprint=_with_scratch(job.footprint, others))
                for step in together
                for job in _own_passes(step)
            )
            continue
        (step,) = together
        others = sum(nbytes for other, nbytes in known.items() if other != index)
        yield from _pass(step, number, others)
        if number < step.passes - 1:
            known[index] = step.known_bytes
        else:
            known.pop(index, None)


def _passes(tensors: Sequence[Sequence[Step]]) -> Iterator[tuple[int, int]]:
    """All passes, as (number, tensor), in their order: the next one of the first tensor whose last one is far enough
    behind, or else the first one of another tensor."""
    begun: dict[int, tuple[int, int]] = {}  # tensors between passes: number of the next one, pieces when the last ended
    pieces_so_far, unbegun = 0, iter(range(len(tensors)))
    while True:
        index = next((index for index, (_, end) in begun.items() if pieces_so_far - end >= BETWEEN_PASSES), None)
        if index is None:
            index = next(unbegun, None)
        if index is None:
            index = next(iter(begun), None)
        if index is None:
            return
        together = tensors[index]
        start = together[0].passes - 1 if together[0].group else 0
        number, _ = begun.pop(index, (start, 0))
        yield number, index
        pieces_so_far += sum(len(step.pieces) for step in together)
        if len(together) == 1 and number < together[0].passes - 1:
            begun[index] = number + 1, pieces_so_far


def _pass(step: Step, number: int, others: int) -> Iterator[Job]:
    """The jobs of one pass, with so many bytes held for other tensors."""
    last = number == step.passes - 1
    for piece in step.pieces:
        footprint = _with_scratch(step.footprint(piece), others)
        if step.held:
            inputs = footprint.inputs if number == 0 else 0
            footprint = replace(footprint, inputs=inputs, scratch=footprint.scratch + step.held_bytes - inputs)
        if not last:
            footprint = replace(footprint, output=0)
        yield Job(step, piece, footprint, number, piece is step.pieces[-1])


def _with_scratch(footprint: Footprint, nbytes: int) -> Footprint:
    return replace(footprint, scratch=footprint.scratch + nbytes)


def batches(steps: Sequence[Step], budget: Budget, finished: Collection[str] = (), threads: int = 1) -> list[Batch]:
    """The jobs of a plan (see `ordered`) in batches, each at the place of its first job.

    So the pieces of one tensor stay in order, and which ones are together does not depend on other shards. On a CPU
    the jobs of a batch are computed side by side, by so many threads together; on CUDA as one, or on streams.
    """
    found: list[list[Job]] = []
    filling: dict[Hashable, list[Job]] = {}
    for job in ordered(steps, budget.tensors, finished):
        most = _most_layers(job, budget, threads)
        together = filling.get(_kind(job)) if most > 1 else None
        if together is not None and len(together) < most:
            together.append(job)
            continue
        found.append([job])
        if most > 1:
            filling[_kind(job)] = found[-1]
    return [Batch(tuple(together)) for together in found]


def _most_layers(job: Job, budget: Budget, threads: int) -> int:
    """Number of jobs like this one in a batch; less than 2 where it is computed alone. As with row ranges, the next
    two are to be read and the last two to be written meanwhile."""
    step, layers = job.step, 1
    if isinstance(step.action, SolveTogether):
        layers = BATCH_ELEMENTS[budget.device] // max(1, math.prod(job.piece.shape))
    if isinstance(step.action, Solve) and step.role.solvable:
        most = MOST_ABREAST[budget.device]
        if budget.device == "cuda":
            layers = max(layers, most)
        elif not step.action.fills_cores(*worked_shape(step.role, step.action, job.piece.shape)):
            layers = max(layers, min(threads, most))
    return min(layers, budget.tensors // max(1, room(job.footprint)))


def _kind(job: Job) -> Hashable:
    """Key that is equal for jobs that may be one batch."""
    step = job.step
    dtypes = (step.dtype, *(entry.dtype for entry in step.inputs))
    role = step.role
    laid = (role.in_axis, role.stacked, role.parts, role.alternating)
    return (step.file, step.action, laid, job.piece.shape, dtypes, step.reads_base)


def room(footprint: Footprint) -> int:
    """Bytes that a piece takes with the next ones being read and the last ones being written."""
    return footprint.peak + READ_AHEAD * footprint.inputs + WRITE_BEHIND * footprint.output
