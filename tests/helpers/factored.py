"""Experts of low rank as entries of plans, made from a file of factors; and the same models with their sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from pymerge.adapters.low_rank import LowRank, Magnitude, Matrix, Term, matrix
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from pymerge.checkpoint.decoded import decoded
from tests.helpers.checkpoints import Tensors

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]  # left and right of a tensor; of a stack, stacks


def adapter(folder: Path, base: Path, factors: Pairs, dora: bool = False) -> Checkpoint:
    """The base with some of its tensors moved by left @ right, which are written to a file in `folder`."""
    folder.mkdir(parents=True)
    stored = {f"{name}.{side}": part for name, pair in factors.items() for side, part in zip("LR", pair, strict=True)}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    parts, model = open_checkpoint(folder), open_checkpoint(base)
    tensors = dict(model.tensors)
    for name in factors:
        left, right, own = parts.tensors[f"{name}.L"], parts.tensors[f"{name}.R"], tensors[name]
        count = left.shape[0] if len(left.shape) == 3 else 0
        terms = [Term(_matrix(left, number), _matrix(right, number), 1.0, 0, number) for number in range(count or 1)]
        made = LowRank(own, tuple(terms), bool(count), Magnitude(left) if dora else None)
        tensors[name] = decoded(name, made, own.dtype)
    stamps = {**model.stamps, **parts.stamps}
    return replace(parts, tensors=tensors, config=model.config, stamps=stamps, base=model)


def _matrix(entry: TensorEntry, number: int) -> Matrix:
    """All of a factor, or of a stack one matrix, picked out of all their rows."""
    if len(entry.shape) == 2:
        return matrix(entry)
    count, rows, columns = entry.shape
    flat = replace(entry, shape=(count * rows, columns))
    return Matrix(flat, (number * rows, (number + 1) * rows, 1), (0, columns, 1))


def moved(base: Tensors, factors: Pairs) -> Tensors:
    """The sums, in float64."""
    found = {name: tensor.double() for name, tensor in base.items()}
    for name, (left, right) in factors.items():
        found[name] += left.double() @ right.double()
    return found
