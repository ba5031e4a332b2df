"""Checkpoints of an adaptation: routers, Adam's moments and the losses so far, in one small safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pymerge.checkpoint.checkpoint import read_header
from pymerge.errors import CheckpointError
from pymerge.wemoe.router_file import write_tensors

_MOMENTS = ("exp_avg", "exp_avg_sq")
_KIND = "pymerge-wemoe-adaptation"


def save_state(
    path: Path,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Adam,
    settings: Mapping[str, str],
    losses: list[list[float]],
) -> None:
    """Write the state of a run, whole or not at all."""
    tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
    for name, parameter in parameters.items():
        tensors[f"router/{name}"] = parameter.detach()
        tensors |= {f"{moment}/{name}": optimizer.state[parameter][moment] for moment in _MOMENTS}
    write_tensors(path, tensors, {"kind": _KIND, **settings})


@torch.no_grad()
def load_state(
    path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Adam, settings: Mapping[str, str]
) -> list[list[float]]:
    """Put a saved state into parameters and optimiser; returns the losses of the steps done.

    Raises CheckpointError if the file is not of this model with these settings.
    """
    header = read_header(path)
    for name, value in {"kind": _KIND, **settings}.items():
        found = header.metadata.get(name)
        if found != value:
            raise CheckpointError(
                f"{path}: is of a run with {name} {found!r}, this one has {value!r}; remove it or name another file"
            )
    wanted = {f"{kind}/{name}" for kind in ("router", *_MOMENTS) for name in parameters} | {"losses"}
    odd = sorted(wanted ^ set(header.entries))
    if odd:
        raise CheckpointError(
            f"{path}: tensor {odd[0]!r} is missing or of another model; remove it or name another file"
        )
    for name, parameter in parameters.items():
        for kind in ("router", *_MOMENTS):
            shape = header.entries[f"{kind}/{name}"].shape
            if shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{path}: tensor {f'{kind}/{name}'!r} has shape {list(shape)}, the router's is "
                    f"{list(parameter.shape)}; remove it or name another file"
                )
    with safe_open(path, "pt") as file:
        losses: list[list[float]] = file.get_tensor("losses").tolist()
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"router/{name}"))
            state: dict[str, Any] = {"step": torch.tensor(float(len(losses)))}
            state |= {moment: file.get_tensor(f"{moment}/{name}").to(parameter.device) for moment in _MOMENTS}
            optimizer.state[parameter] = state
    return losses
