"""Cutting steps into pieces that fit a budget, with pieces being read ahead and written behind."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from pymerge.common.dtypes import ITEM_SIZES
from pymerge.common.units import format_bytes
from pymerge.errors import PlanError
from pymerge.methods.actions import Solve
from pymerge.planner import pieces
from pymerge.planner.budget import DEVICE_SHARE, Budget
from pymerge.planner.jobs import READ_AHEAD, Job, jobs, read_threads, room
from pymerge.planner.pieces import Piece
from pymerge.planner.steps import Step

# Elements of a row range of an elementwise step: a read is one long request, and what it brings is still in the cache
# when it is used.
CHUNK_ELEMENTS = 3 * 2**19
# Bytes of one input of such a range on a device, which has started a hundred launches before it has read as little.
DEVICE_CHUNK_BYTES = 2**28
# Bytes of the inputs up to which a tensor that is reduced before it is merged is held meanwhile, on a CPU; larger ones
# are read again for each pass. Those are mostly the one table of a model: nothing else will use such memory again, and
# to fill it for the first time takes longer than to copy from the page cache twice. The memory of a GPU is there to be
# used: there a tensor is held whole if it fits.
HELD_BYTES = 5 * 2**25


def fit(steps: Sequence[Step], budget: Budget) -> tuple[Step, ...]:
    """The steps in pieces that fit the budget. Raises PlanError, which names the smallest that would do."""
    largest = max(steps, key=lambda step: step.footprint(step.smallest).peak, default=None)
    needed = largest.footprint(largest.smallest).peak if largest else 0
    if largest and needed > budget.tensors:
        remedy = _more(needed, budget)
        if isinstance(largest.action, Solve):
            remedy += f", or leave that tensor out of what is solved (exclude: ['{re.escape(largest.name)}'])"
        raise PlanError(
            [
                f"memory: {largest.action.label} on {largest.name!r} {list(largest.shape)} holds "
                f"{format_bytes(needed, round_up=True)} of tensors at once, the limit is "
                f"{format_bytes(budget.tensors)} ({budget.origin}); {remedy}"
            ]
        )
    fitting = tuple(_fitted(step, budget) for step in steps)
    staging = pinned_bytes(fitting, budget)
    if staging > budget.host:
        raise PlanError(
            [
                f"memory: copying to the device takes {format_bytes(staging)} of pinned memory, the limit is "
                f"{format_bytes(budget.host)}; give --memory {format_bytes(staging, round_up=True)} or more"
            ]
        )
    return fitting


def _more(needed: int, budget: Budget) -> str:
    """Remedy where so many bytes of tensors do not fit."""
    if budget.device != "cuda":
        return f"give --memory {format_bytes(needed, round_up=True)} or more"
    if budget.device_limit is None:
        return "choose a larger device, give --device cpu"
    allowed = format_bytes(math.ceil(needed / DEVICE_SHARE), round_up=True)
    return f"give --device-memory {allowed} or more, choose a larger device, give --device cpu"


def pinned_bytes(steps: Sequence[Step], budget: Budget) -> int:
    """Bytes of the host for buffers between files and a device: one for each thread that reads, one to write from."""
    return (read_threads(budget.device) + 1) * staging_bytes(jobs(steps)) if budget.device == "cuda" else 0


def staging_bytes(queue: Iterable[Job]) -> int:
    """Size of a pinned buffer that holds any input or output; PyTorch rounds it up to a power of two."""
    largest = 1
    for job in queue:
        elements = math.prod(job.piece.shape)
        items = [ITEM_SIZES[entry.dtype] for entry in job.step.inputs]
        largest = max(largest, job.footprint.output, *(elements * item for item in items))
    return 1 << (largest - 1).bit_length()


def _chunk(step: Step, budget: Budget) -> int:
    """Elements of a row range, where there is room for them. On a device pinned memory of half of the host's share
    holds them."""
    if budget.device != "cuda":
        return CHUNK_ELEMENTS
    largest = max(ITEM_SIZES[code] for code in (step.dtype, *(entry.dtype for entry in step.inputs)))
    pinned = min(DEVICE_CHUNK_BYTES, budget.host // 2 // (read_threads(budget.device) + 1))
    return max(CHUNK_ELEMENTS, pinned // largest)


def _fitted(step: Step, budget: Budget) -> Step:
    """The step in row ranges as large as `_chunk` says, smaller where they would not leave room to read ahead and write
    behind within the limit; in its own ranges where it is reduced before it is merged, held or not; actions on whole
    matrices keep their pieces."""
    if len(step.ranges) > 1:
        whole = Piece(0, step.shape[0], step.shape)
        footprint = step.footprint(whole)
        fits = room(footprint) <= budget.tensors
        if budget.device == "cuda":
            return replace(step, pieces=(whole,) if fits else step.ranges)
        ranged = replace(step, pieces=step.ranges)
        holds = fits and footprint.inputs <= HELD_BYTES and step.group is None
        return replace(ranged, held=holds and ranged.passes > 1)
    if not pieces.by_rows(step.action) or not step.shape or step.shape[0] == 0:
        return step
    decoding = (1 + READ_AHEAD) * step.decoding_bytes  # which larger pieces do not need more of
    needed = room(step.footprint(step.smallest)) - decoding
    elements = math.prod(step.smallest.shape)
    most = min(_chunk(step, budget), max(1, (budget.tensors - decoding) // max(1, needed)) * elements)
    return replace(step, pieces=tuple(pieces.split(step.role, step.action, step.shape, most)))
