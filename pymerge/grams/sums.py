"""Sums of x x^T over the inputs x of linear layers, and the files that they are kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from pymerge.common.dtypes import bytes_of
from pymerge.common.files import atomic_write, fsync_directory, os_errors
from pymerge.errors import NonFiniteError
from pymerge.ops._precision import ieee_products

# Rows of inputs that are multiplied at once: their products are added in float64.
_ROWS = 4096


class Sums:
    """Sums in float64, and counts of rows, by the names of weights."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self._last: tuple[Tensor, Tensor] | None = None  # inputs of the layer before, and their sum

    def add(self, name: str, inputs: Tensor) -> None:
        """Add the inputs of a layer, ... x d_in. Layers that read one tensor one after the other share its products."""
        if self._last is None or self._last[0] is not inputs:
            self._last = inputs, _product(inputs.reshape(-1, inputs.shape[-1]))
        product = self._last[1]
        if name in self.sums:
            self.sums[name] += product
        else:
            self.sums[name] = product.clone()
        self.counts[name] = self.counts.get(name, 0) + inputs.numel() // max(1, inputs.shape[-1])

    def forget_last(self) -> None:
        """Hold no inputs any more."""
        self._last = None

    @contextmanager
    def of(self, layers: Iterable[tuple[str, nn.Module]]) -> Iterator[None]:
        """Add what these layers, each with the name of its weight, are given meanwhile."""

        def hook_of(name: str) -> Any:
            def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                self.add(name, given[0] if given else next(iter(named.values())))

            return hook

        hooks = [each.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, each in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.forget_last()

    def means(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The Grams, exactly symmetric; of layers that were given something. Raises NonFiniteError, which names one."""
        found = {}
        for name, total in self.sums.items():
            if count := self.counts[name]:
                gram = ((total + total.mT) / (2 * count)).to("cpu", dtype)
                if not bool(gram.isfinite().all()):
                    raise NonFiniteError(
                        f"inputs of {name} have products that are not finite", "give --dtype float32, or other data"
                    )
                found[name] = gram.contiguous()
        return found


def _product(rows: Tensor) -> Tensor:
    with ieee_products(rows.device.type):
        total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            part = part if part.dtype == torch.float64 else part.float()
            total += part.mT @ part
        return total


@dataclass(frozen=True)
class Kept:
    """A file of the work folder: tensors by name, and what was counted with them."""

    path: Path
    counts: Mapping[str, int]
    done: int


def keep(path: Path, tensors: Mapping[str, Tensor], counts: Mapping[str, int], done: int = 0) -> None:
    """Write a file of the work folder, whole or not at all."""
    about = {"counts": json.dumps(dict(counts)), "done": str(done)}
    atomic_write(path, save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, about))


def kept(path: Path) -> Kept | None:
    """Counts that such a file has of itself; None where there is none."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    return Kept(path, json.loads(about["counts"]), int(about["done"]))


def tensors_of(path: Path) -> dict[str, Tensor]:
    """All tensors of such a file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def join(parts: Sequence[Path], out: Path, metadata: Mapping[str, str]) -> None:
    """Write all tensors of files into one, in the order of their names, a tensor in memory at a time.

    It is whole, or not there: until then it lies beside the first of them. Raises OutputError.
    """
    where: dict[str, Path] = {}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for part in parts:
        with safe_open(part, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), part)
    at = 0
    temporary = parts[0].with_name(f".{out.name}.tmp")
    for name in sorted(where):
        with safe_open(where[name], framework="pt") as file:
            view = file.get_slice(name)
            size = view.get_shape()
            nbytes = size[0] * size[1] * (8 if view.get_dtype() == "F64" else 4)
            header[name] = {"dtype": view.get_dtype(), "shape": size, "data_offsets": [at, at + nbytes]}
            at += nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    try:
        with os_errors(out, "writing"):
            with open(temporary, "wb") as stream:
                stream.write(len(text).to_bytes(8, "little") + text)
                for name in sorted(where):
                    with safe_open(where[name], framework="pt") as file:
                        stream.write(bytes_of(file.get_tensor(name)))
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, out)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(out.parent)
