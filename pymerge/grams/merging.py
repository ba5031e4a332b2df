"""Some steps of a plan carried out in memory, as the engine carries out all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import bytes_of, torch_dtype
from pymerge.common.progress import NoProgress
from pymerge.engine.executor import Executor
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Context
from pymerge.output.layout import ShardLayout
from pymerge.output.shard import Task
from pymerge.planner.jobs import batches
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step


class _Held:
    """Sink that keeps what is made, by the names of tensors."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = {step.name: step for step in steps}
        self._bytes: dict[str, bytearray] = {step.name: bytearray() for step in steps}

    def take(self, tensor_name: str, data: Tensor | memoryview) -> Sequence[Task]:
        """Take a copy of the next bytes of a tensor; nothing is left to do."""
        self._bytes[tensor_name] += data if isinstance(data, memoryview) else bytes_of(data.contiguous())
        return ()

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file; none is written."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors, in the dtypes of the output."""
        return {name: _tensor(self._steps[name], data) for name, data in self._bytes.items()}


def _tensor(step: Step, data: bytearray) -> Tensor:
    dtype = torch_dtype(step.dtype)
    return torch.frombuffer(data, dtype=dtype).view(step.shape) if data else torch.empty(step.shape, dtype=dtype)


def merge_in_memory(plan: Plan, steps: Sequence[Step], reader: Reader, run: Runner) -> Mapping[str, Tensor]:
    """The merged tensors of some steps of a plan, as they will be in the output, on the CPU."""
    sink = _Held(steps)
    with Tracer() as tracer:
        context = Context(run, reader, tracer, NoProgress(), plan.config.allow_nonfinite, plan.keeps_cache)
        queue = batches(steps, plan.budget, threads=plan.target.threads)
        Executor(context, sink, plan.target.threads).run(queue, plan.budget.tensors)
    return sink.tensors
