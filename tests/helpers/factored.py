"""Experts of low rank as entries of plans, made from a file of factors; and the same models with their sums written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from pymerge.checkpoint.decoded import Span, decoded
from pymerge.checkpoint.factored import FactoredDecoder
from tests.helpers.checkpoints import Tensors


@dataclass(frozen=True)
class Plain(FactoredDecoder):
    """W_0 + left @ right, all stored in float32; of stacks the factors are stacks."""

    base: TensorEntry
    left: TensorEntry
    right: TensorEntry
    low: bool = True  # False: as of DoRA

    kind = "adapter"

    @property
    def shape(self):
        return self.base.shape

    @property
    def parts(self):
        return (self.base, self.left, self.right)

    @property
    def rank(self):
        return self.left.shape[-1] if self.low else None

    def _read(self, read, entry):
        return np.frombuffer(read(entry, 0, entry.shape[0]), np.float32).reshape(entry.shape).astype(np.float64)

    def factors(self, read, matrix):
        left, right = self._read(read, self.left), self._read(read, self.right)
        return (left[matrix], right[matrix]) if left.ndim == 3 else (left, right)

    def spans(self, start, stop):
        yield Span(self.base, start, stop)

    def decode(self, read, out, start, stop):
        bits = np.frombuffer(read(self.base, start, stop), np.uint16 if self.base.dtype == "BF16" else np.float32)
        rows = (bits.astype(np.uint32) << 16).view(np.float32) if self.base.dtype == "BF16" else bits
        left, right = self._read(read, self.left), self._read(read, self.right)
        delta = left[start:stop] @ right
        out[...] = rows.reshape(out.shape) + delta.astype(np.float32)

    def scratch(self, elements):
        return 16 * elements


def adapter(
    folder: Path, base: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], **form: bool
) -> Checkpoint:
    """The base with some of its tensors moved by left @ right, which are written to a file in `folder`."""
    folder.mkdir(parents=True)
    stored = {f"{name}.{side}": part for name, pair in factors.items() for side, part in zip("LR", pair, strict=True)}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    parts, model = open_checkpoint(folder), open_checkpoint(base)
    tensors = dict(model.tensors)
    for name in factors:
        own = Plain(tensors[name], parts.tensors[f"{name}.L"], parts.tensors[f"{name}.R"], **form)
        tensors[name] = decoded(name, own, tensors[name].dtype)
    return replace(parts, tensors=tensors, config=model.config, stamps={**model.stamps, **parts.stamps})


def moved(base: Tensors, factors: Pairs) -> Tensors:
    """The sums, in float64."""
    found = {name: tensor.double() for name, tensor in base.items()}
    for name, (left, right) in factors.items():
        found[name] += left.double() @ right.double()
    return found
