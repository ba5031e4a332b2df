"""Plans carried out into memory: into tensors that are there, or new ones, instead of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import torch_dtype
from pymerge.common.names import listed
from pymerge.common.progress import NoProgress
from pymerge.engine.executor import Executor
from pymerge.engine.measuring import measured
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Context
from pymerge.errors import PymergeError
from pymerge.output.layout import ShardLayout
from pymerge.output.shard import Task
from pymerge.planner.jobs import batches
from pymerge.planner.plan import Plan
from pymerge.planner.steps import Step


def merge_in_memory(plan: Plan) -> dict[str, Tensor]:
    """New tensors on the CPU, by name: what the plan would write to the model's files.

    Raises PymergeError, one of its subclasses.
    """
    places = {
        tensor.name: torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype))
        for layout in plan.layouts
        for tensor in layout.tensors
    }
    write_steps(plan, plan.steps, places, atomic=False)
    return places


def write_steps(plan: Plan, steps: Sequence[Step], places: Mapping[str, Tensor], *, atomic: bool) -> None:
    """Carry out steps of a plan, of whole tensors, into tensors of their shapes and dtypes.

    Args:
        places: where each step's result goes, by its name; it may be the step's own base.
        atomic: keep a copy of what is overwritten on the CPU until all is done, and write it back if it is not.

    Raises PymergeError, one of its subclasses; without `atomic` it says which tensors are overwritten.
    """
    sink = _InPlace(places, keeps=atomic)
    with Reader(plan.inputs.stamps) as reader, Tracer() as tracer:
        runner = Runner(plan.target.backend, plan.target.device)
        context = Context(runner, reader, tracer, NoProgress(), plan.config.allow_nonfinite, True)
        try:
            known = measured(steps, plan.budget, context, plan.target.threads)
            queue = batches(known, plan.budget, threads=plan.target.threads)
            Executor(context, sink, plan.target.threads).run(queue, plan.budget.tensors)
        except BaseException as error:
            if atomic:
                sink.write_back()
            elif sink.written and isinstance(error, PymergeError):
                error.args = (f"{error}; overwritten are {listed(list(sink.written))}, the last perhaps in part",)
            raise


class _InPlace:
    """Sink that writes to tensors which may be those that are merged: rows are read before they are written, and no
    row is read for another.

    Args:
        keeps: whether what is overwritten is copied before.
    """

    def __init__(self, places: Mapping[str, Tensor], *, keeps: bool) -> None:
        self.written: dict[str, int] = {}  # elements
        self._places = places
        self._keeps = keeps
        self._kept: dict[str, Tensor] = {}

    def take(self, tensor_name: str, data: Tensor | memoryview) -> Sequence[Task]:
        """Take the next rows of a tensor, in its dtype."""
        place = self._places[tensor_name].detach()
        if self._keeps and tensor_name not in self._kept:
            self._kept[tensor_name] = place.to("cpu", copy=True)
        values = torch.frombuffer(data, dtype=place.dtype) if isinstance(data, memoryview) else data.reshape(-1)
        first = self.written.get(tensor_name, 0)
        last = self.written[tensor_name] = first + values.numel()
        rows = place.shape[0] if place.ndim else 1
        width = max(1, place.numel() // max(1, rows))
        part = place[first // width : last // width] if place.ndim else place
        part.copy_(values.view(part.shape))
        return ()

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file; all of a merge's are planned."""

    def write_back(self) -> None:
        """Give all tensors the values that they had."""
        for name, values in self._kept.items():
            self._places[name].detach().copy_(values)
