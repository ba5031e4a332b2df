"""Biases that adapters train in place of the model's own: PEFT keeps those of one adapter in the model, and the model's
own nowhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from torch import Tensor, nn

from pymerge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from pymerge.checkpoint.held import HeldEntry
from pymerge.checkpoint.reader import Reader
from pymerge.common.names import listed
from pymerge.errors import ArgumentError
from pymerge.extraction.names import names_in_memory
from pymerge.live.checkpoints import hold

Base: TypeAlias = nn.Module | Mapping[str, Tensor] | str | Path
_OWNER = "the base"


def is_bias(name: str) -> bool:
    """Whether PEFT takes a tensor of this name for a bias."""
    return name.rpartition(".")[2] == "bias"


def own_biases(held: Checkpoint, base: Base, names: Collection[str]) -> dict[str, HeldEntry]:
    """The biases that a model had before an adapter was trained, in the dtypes that they have in the model.

    Args:
        held: the model as it is now.
        base: as it was; tensors by the names that they have in memory.
        names: of the biases.

    Raises ArgumentError if `base` has others, CheckpointError if it cannot be read.
    """
    if isinstance(base, (str, Path)):
        found = open_checkpoint(base)
        there = {memory: found.tensors[name] for name, memory in names_in_memory(found).items()}
    else:
        found = hold(_OWNER, dict(base.state_dict() if isinstance(base, nn.Module) else base))
        there = dict(found.tensors)
    if odd := [name for name in names if name not in there or there[name].shape != held.tensors[name].shape]:
        raise ArgumentError(f"{found.path} has no, or other, {listed(odd)}; give the model that the adapters are for")
    biases = {}
    with Reader(found.stamps) as reader:
        for number, name in enumerate(names):
            now, entry = held.tensors[name], there[name]
            if not isinstance(now, HeldEntry):
                raise ArgumentError(f"{name} is not in memory (offloaded); load the model without offloading")
            read = entry.tensor if isinstance(entry, HeldEntry) else reader.read(entry)
            biases[name] = replace(
                now, tensor=read.to(now.tensor.device, now.tensor.dtype, copy=True), offset=-1 - number
            )
    return biases
