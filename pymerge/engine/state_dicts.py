"""State dicts in memory, checked as checkpoints are: no quantised weights, and the same integers in all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pymerge.architecture.roles import Kind, Role
from pymerge.checkpoint.quantised import quantised
from pymerge.common.dtypes import code_of
from pymerge.errors import ArgumentError
from pymerge.planner.integers import COUNTERS, integer_weights


def check_plain(owner: str, state: Mapping[str, Tensor]) -> None:
    """Raise ArgumentError, which says whose it is, if a state dict has anything but tensors, or is quantised."""
    if not isinstance(state, Mapping):
        raise ArgumentError(
            f"{owner} is a {type(state).__name__}; pass a mapping of names to tensors, as state_dict() gives"
        )
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            kind = f"{type(tensor).__module__}.{type(tensor).__name__}".removeprefix("builtins.")
            made = "torch.from_numpy makes one" if kind == "numpy.ndarray" else "leave it out, if it is no weight"
            raise ArgumentError(f"{owner} has a {kind} under {name!r}, and no tensor of PyTorch; {made}")
    real = {name: tensor for name, tensor in state.items() if not tensor.is_complex()}
    described = {name: (code_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in real.items()}
    if found := quantised(described):
        raise ArgumentError(f"{owner} {found[1]}")
    if weights := integer_weights(described, {}):
        raise ArgumentError(
            f"{owner} has integers ({described[weights[0]][0]}) where weights should be, {weights[0]!r}, codes of a "
            "quantised model; merge the original weights instead, or leave the tensor out"
        )


def check_integers(
    base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]], roles: Mapping[str, Role]
) -> None:
    """Raise ArgumentError for integers, which are copied from the base, of which an expert has others."""
    for name in (name for name, role in roles.items() if role.kind is Kind.BUFFER):
        if name.rpartition(".")[2] in COUNTERS:
            continue
        for index, expert in enumerate(experts):
            if not _equal(base[name].cpu(), expert[name].cpu()):
                raise ArgumentError(
                    f"{name}: expert {index} has other integers than the base, which can be copied, but not merged; "
                    "pass models that agree in them, or leave the tensor out"
                )


def _equal(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape:
        return False
    if one.dtype == two.dtype:  # PyTorch does not compare all unsigned integers, but their bytes
        return torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))
    return torch.equal(one.to(torch.float64), two.to(torch.float64))
