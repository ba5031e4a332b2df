"""Data sets of tasks in one file each, and shuffled batches of them for adaptation."""

from __future__ import annotations

import hashlib
import inspect
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pymerge.checkpoint.checkpoint import read_header
from pymerge.common.names import nearest
from pymerge.errors import CheckpointError

_IMAGES = ("images", "pixel_values")


@dataclass(frozen=True)
class Dataset:
    """N samples: tensors by the model's argument names (`images` is its first argument), and labels if there are any.

    Iterating gives batches for `adapt`, in an order that PyTorch's generator draws anew each time.
    """

    inputs: Mapping[str, Tensor]
    labels: Tensor | None
    batch_size: int

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(self))
        for start in range(0, len(self), self.batch_size):
            places = order[start : start + self.batch_size]
            batch: Any = {name: tensor[places] for name, tensor in self.inputs.items()}
            if "images" in batch:
                batch = batch["images"]
            yield batch if self.labels is None else (batch, self.labels[places])

    def digest(self) -> str:
        """A hash of everything that decides the batches."""
        found = hashlib.sha256(str(self.batch_size).encode())
        tensors = {**self.inputs, **({} if self.labels is None else {"labels": self.labels})}
        for name, tensor in sorted(tensors.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()


def read_dataset(path: Path, model: nn.Module, batch_size: int) -> Dataset:
    """Read a .safetensors or .npz file whose arrays have N samples along their first axis.

    `labels` are classes (N) or tokens (N x S, -100 where there is none). Every other array is an argument of the
    model, by its name; `images` alone stands for the first one. Pictures of whole bytes (`images`, `pixel_values`
    in uint8) become float32 in [0, 1]; other floating arrays become float32, other integers int64.

    Raises CheckpointError if the file is damaged or does not fit the model.
    """
    tensors = _read(path)
    labels = tensors.pop("labels", None)
    if not tensors:
        raise CheckpointError(f"{path}: holds no inputs; give arrays named as the model's arguments, or images")
    if "images" in tensors and len(tensors) > 1:
        other = next(name for name in tensors if name != "images")
        raise CheckpointError(f"{path}: holds images and {other}; images go alone, name them as the argument instead")
    _check_names(path, tensors, model)
    everything = tensors if labels is None else tensors | {"labels": labels}
    counts = {name: len(tensor) if tensor.ndim else None for name, tensor in everything.items()}
    if len(set(counts.values())) > 1 or None in counts.values() or 0 in counts.values():
        raise CheckpointError(f"{path}: arrays have {counts} samples; give at least one, and as many in each")
    if labels is not None and (labels.is_floating_point() or labels.ndim > 2):
        raise CheckpointError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; give integers, N or N x S")
    inputs = {name: _converted(name, tensor) for name, tensor in tensors.items()}
    return Dataset(inputs, None if labels is None else labels.to(torch.int64), batch_size)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        read_header(path)  # its errors name what is wrong with the file
        return load_file(path)
    if path.suffix != ".npz":
        raise CheckpointError(f"{path}: is neither .safetensors nor .npz; write the data set as one of these")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); write it again with numpy.savez") from error


def _check_names(path: Path, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD and not parameter.annotation for parameter in parameters.values()):
        return
    for name in sorted(set(tensors) - set(parameters) - {"images"}):
        near = nearest(name, [*parameters, "images", "labels"])
        hint = f"did you mean {near!r}?" if near else f"it takes {', '.join(parameters)}"
        raise CheckpointError(f"{path}: {type(model).__name__} has no argument {name!r}, {hint}; rename the array")


def _converted(name: str, tensor: Tensor) -> Tensor:
    if name in _IMAGES and tensor.dtype == torch.uint8:
        return tensor.to(torch.float32) / 255
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.to(torch.float32 if tensor.is_floating_point() else torch.int64)
