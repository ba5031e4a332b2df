"""A merge of live adapters into the weights of their model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pymerge.integrations.peft.biases import Base
from pymerge.integrations.peft.live import Live
from pymerge.integrations.peft.merging import plan_adapters
from pymerge.live.planned import write_steps


def merge_adapters_into(
    model: nn.Module,
    adapters: Sequence[str],
    method: str = "task_arithmetic",
    *,
    weights: Sequence[float] | Mapping[str, float] | None = None,
    device: str | torch.device = "auto",
    memory: int | str | None = None,
    base: Base | None = None,
    atomic: bool = True,
    **parameters: Any,
) -> nn.Module:
    """Merge adapters into the weights of their live model, in place, and take all adapters away.

    As PEFT's `merge_and_unload`, by any method, and with modules_to_save, trained tokens and DoRA: each tensor is what
    `pymerge.merge` makes of the model's and the adapters' files. Memory holds pieces of a few tensors beside the model,
    and a copy of the weights that change.

    Args:
        model: a PeftModel, or any module with layers of PEFT's LoRA in it.
        adapters: names of adapters of the model, at least one.
        method, weights, memory, parameters: as of `add_merged_adapter`.
        device: where to compute, as of `pymerge.merge`.
        base: the model without adapters: a module, its tensors by name, a folder or a file. Needed where an adapter of
            the model has a `bias`, which PEFT trains in the model itself.
        atomic: keep the weights that change on the CPU until all is done, and write them back if it is not.

    Returns:
        The model without PEFT; its weights are the same tensors as before, with new values.

    Raises:
        PymergeError: one of its subclasses. The model is then as it was; without `atomic` its adapters are, and the
            error says which weights are overwritten.
    """
    live = Live(model, base)
    live.check_biases(
        live.configs, "give base=, the model that it was trained from: its folder, a module, or tensors by name"
    )
    plan = plan_adapters(live, adapters, method, weights, parameters, device=device, memory=memory)
    changed = [step for step in plan.steps if step.experts or step.name in live.biases]
    write_steps(plan, changed, live.parameters, atomic=atomic)
    return live.unload()
