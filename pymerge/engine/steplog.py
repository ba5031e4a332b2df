"""Events of steps: when the first piece of a tensor begins, and when the last one is done."""

from __future__ import annotations

import time
from logging import DEBUG

from pymerge.common.events import event
from pymerge.planner.jobs import Slot


class StepLog:
    """Logs steps whose pieces begin and end in order."""

    def __init__(self) -> None:
        self._began: dict[str, float] = {}  # of the steps that are being carried out

    def begins(self, slot: Slot) -> None:
        if slot.starts_step:
            name = slot.step.name
            self._began[name] = time.perf_counter()
            event("step_started", name, level=DEBUG, tensor=name, action=slot.step.action.label)

    def ends(self, slot: Slot) -> None:
        step = slot.step
        if slot.ends_step:
            size = {"bytes_read": step.bytes_read, "bytes_written": step.nbytes}
            seconds = time.perf_counter() - self._began.pop(step.name)
            event("step_finished", step.name, level=DEBUG, tensor=step.name, seconds=seconds, **size)
