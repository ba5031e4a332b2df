"""A merge of live adapters into the weights of their model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymerge.backends.runner import Runner
from pymerge.checkpoint.reader import Reader
from pymerge.common.progress import NoProgress
from pymerge.engine.executor import Executor
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Context
from pymerge.errors import PymergeError
from pymerge.integrations.peft.live import Live
from pymerge.integrations.peft.merging import plan_adapters
from pymerge.output.layout import ShardLayout
from pymerge.planner.jobs import batches


def merge_adapters_into(
    model: nn.Module,
    adapters: Sequence[str],
    method: str = "task_arithmetic",
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    device: str | torch.device = "auto",
    memory: int | str | None = None,
    **parameters: Any,
) -> nn.Module:
    """Merge adapters into the weights of their live model, in place, and take all adapters away.

    As PEFT's `merge_and_unload`, by any method, and with modules_to_save, trained tokens and DoRA: each tensor is what
    `pymerge.merge` makes of the model's and the adapters' files. Memory holds pieces of a few tensors beside the model.

    Args:
        model: a PeftModel, or any module with layers of PEFT's LoRA in it.
        adapters: names of adapters of the model, at least one.
        method, weights, memory, parameters: as of `add_merged_adapter`.
        device: where to compute, as of `pymerge.merge`.

    Returns:
        The model without PEFT; its weights are the same tensors as before, with new values.

    Raises:
        PymergeError: one of its subclasses. The adapters are then still there; if values of weights have changed by
            then, a note of the exception names them.
    """
    live = Live(model)
    plan = plan_adapters(live, adapters, method, weights, parameters, device=device, memory=memory)
    steps = [step for step in plan.steps if step.experts]
    sink = _InPlace(live.parameters)
    with Reader(plan.inputs.stamps) as reader, Tracer() as tracer:
        runner = Runner(plan.target.backend, plan.target.device)
        context = Context(runner, reader, tracer, NoProgress(), plan.config.allow_nonfinite, True)
        try:
            queue = batches(steps, plan.budget, frozenset())
            Executor(context, sink, plan.target.threads).run(queue, plan.budget.tensors)
        except PymergeError as error:
            if sink.changed:
                raise type(error)(f"{error} (values of {len(sink.changed)} tensors have changed)") from error
            raise
    return live.unload()


class _InPlace:
    """Sink that writes to the weights themselves. Rows are read before they are written, and no row is read for
    another."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.changed: dict[str, int] = {}  # elements that are written
        self._parameters = parameters

    def write(self, tensor_name: str, data: Tensor | memoryview) -> None:
        """Take the next rows of a tensor, in its dtype."""
        weight = self._parameters[tensor_name].detach()
        values = torch.frombuffer(data, dtype=weight.dtype) if isinstance(data, memoryview) else data.reshape(-1)
        first = self.changed.get(tensor_name, 0)
        last = self.changed[tensor_name] = first + values.numel()
        rows = weight.shape[0] if weight.ndim else 1
        width = max(1, weight.numel() // max(1, rows))
        part = weight[first // width : last // width] if weight.ndim else weight
        part.copy_(values.view(part.shape))

    def settle(self, layout: ShardLayout) -> None:
        """Take the layout of a file; all of a merge's are planned."""
