"""Assignments: what another process is given to merge files of a plan, with the device and memory that it has."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pymerge.common.progress import ProgressSink
from pymerge.engine.parts import merge_part
from pymerge.engine.report import MergeReport
from pymerge.engine.run import processor, resolve_target
from pymerge.errors import BackendError
from pymerge.planner.budget import budget
from pymerge.planner.fit import fit
from pymerge.planner.plan import Plan


@dataclass(frozen=True)
class Assignment:
    """Files of a plan, which is pickled, and where they are to be merged: a device, and bytes of memory for tensors."""

    plan: bytes
    out: Path
    files: tuple[str, ...]
    device: str
    memory: int | None

    def carry_out(self, progress: ProgressSink) -> MergeReport:
        """Merge the files in this process.

        Raises:
            CheckpointError: an input is not here, or not as it was when the plan was made.
            OutputError: this process would make other bytes: another processor, or another version.
            PymergeError: another of its subclasses.
        """
        plan = fitted_here(pickle.loads(self.plan), self.device, self.memory)
        plan.check_inputs()
        return merge_part(plan, self.out, self.files, plan.identity(processor(plan)), progress)


def pack(plan: Plan) -> bytes:
    """A plan for `Assignment`."""
    return pickle.dumps(plan, pickle.HIGHEST_PROTOCOL)


def fitted_here(plan: Plan, device: str, memory: int | None) -> Plan:
    """The plan on a device of this process, in pieces that fit the memory here; its limit on a device stays.

    Raises BackendError, PlanError, ArgumentError.
    """
    target = resolve_target(device, plan.target.backend)
    if target.native != plan.target.native:
        raise BackendError("native code loads in one process of this merge and not in another; install pymerge alike")
    limits = budget(target.device, memory, plan.budget.device_limit)
    return replace(plan, target=target, budget=limits, steps=fit(plan.steps, limits))


def combined(reports: Sequence[MergeReport], whole: MergeReport) -> MergeReport:
    """The report of a merge by several processes: sums of theirs and means of their times in that of the whole."""
    count = max(1, len(reports))
    return replace(
        whole,
        bytes_read=sum(each.bytes_read for each in reports),
        bytes_written=sum(each.bytes_written for each in reports),
        reading=sum(each.reading for each in reports) / count,
        computing=sum(each.computing for each in reports) / count,
        writing=sum(each.writing for each in reports) / count,
        overlap=sum(each.overlap for each in reports) / count,
        slowest=tuple(sorted((step for each in reports for step in each.slowest), key=lambda step: -step.total)[:10]),
        peak_memory=max((each.peak_memory for each in reports), default=whole.peak_memory),
        peak_device_memory=max((each.peak_device_memory for each in reports), default=0),
        backends={op: name for each in reports for op, name in each.backends.items()},
    )
