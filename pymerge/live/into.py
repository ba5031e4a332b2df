"""One merge into a live module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pymerge.live.merger import Merger
from pymerge.live.models import Source
from pymerge.live.modules import Model


def merge_into(
    module: Model,
    experts: Sequence[Source],
    method: str = "wudi",
    *,
    base: Source | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    names: Sequence[str] | None = None,
    atomic: bool = False,
    options: Mapping[str, Any] | None = None,
    **parameters: Any,
) -> None:
    """Merge experts into a live module, in place: its weights are the base, unless one is given.

    The same values as those of a merge of files, bit for bit. Beside the module, one tensor of each model is in memory
    at a time, of experts that are named by path. Afterwards the base is gone: for several merges there is `Merger`.

    Args:
        module: a module, or tensors by name.
        experts, method, device, backend, options, parameters: as of `Merger`.
        base: what the experts were trained from, if it is not the module.
        names: parts of tensors' names: those that have one of them in their names are merged, the others stay as they
            are. Default: all.
        atomic: keep a copy of the module on the CPU until all is done, and write it back if it is not.

    Raises:
        PlanError, ArgumentError, ConfigError, CheckpointError: before anything is overwritten.
        NonFiniteError, OutOfMemoryError, BackendError: they say which tensors are overwritten.
    """
    merger = Merger(
        module if base is None else base,
        experts,
        method,
        device=device,
        backend=backend,
        cache="none",
        options=options,
        **parameters,
    )
    merger.overwrite_once(module, atomic=atomic, names=names)
