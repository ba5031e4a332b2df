"""Workers of steps: native code on arrays where all of a step can be had there, else PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field

from pymerge import env
from pymerge.common.devices import Device
from pymerge.common.dtypes import NATIVE, native_dtype
from pymerge.methods.actions import Combine, Elementwise, InCore
from pymerge.methods.reduce import Reduce
from pymerge.planner.steps import Step, WorkerName


@dataclass(frozen=True)
class Target:
    """Device and backend of a plan. `native` says whether the C++ extension loads."""

    device: Device = field(default_factory=lambda: Device("cpu"))
    backend: str = "auto"
    native: bool = True
    threads: int = field(default_factory=env.threads)  # of native code, as many as the machine gives

    @property
    def takes_arrays(self) -> bool:
        """Whether steps may go without PyTorch."""
        return self.native and self.device.type == "cpu" and self.backend in ("auto", "native")


def worker_of(step: Step, target: Target) -> WorkerName:
    """The worker of a step on this target.

    Native code takes tensors that can be read without PyTorch, in the dtypes that it computes in, or decoded to one.
    Others go to PyTorch, alone.
    """
    if isinstance(step.action, InCore):
        return "core"
    if not target.takes_arrays or any(entry.needs_torch for entry in step.inputs):
        return "torch"
    dtypes = {step.dtype, *(native_dtype(entry.dtype) for entry in step.inputs)}
    known = step.copies_bits or dtypes <= NATIVE.keys()
    return "native" if known and isinstance(step.action, (Combine, Elementwise, Reduce)) else "torch"
