"""Factors held against the weights of the base that they are for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from pymerge.adapters.factors import Matrix, trimmed
from pymerge.adapters.folder import AdapterFiles
from pymerge.adapters.keys import Module
from pymerge.adapters.settings import Settings
from pymerge.architecture.roles import Kind, Role, classify
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.errors import CheckpointError


def roles_of(base: Checkpoint) -> dict[str, Role]:
    """Roles of a base's tensors: those that several adapters on it may share."""
    return classify({name: (entry.dtype, entry.shape) for name, entry in base.tensors.items()}, base.config)


class Fitting:
    """Rule for how factors stand in the weights of a base, and errors of those that fit none."""

    def __init__(
        self, base: Checkpoint, files: AdapterFiles, settings: Settings, roles: Mapping[str, Role] | None
    ) -> None:
        self._base = base
        self._files = files
        self._settings = settings
        self._roles = roles

    @cached_property
    def roles(self) -> Mapping[str, Role]:
        """Roles of the base's tensors."""
        return roles_of(self._base) if self._roles is None else self._roles

    def sides(self, module: Module, tensor: str, entry: TensorEntry) -> tuple[Matrix, Matrix, bool]:
        """Both factors as they stand in the stored weight: B and A, or A and B transposed; and whether DoRA's lengths
        are those of its rows."""
        a, b = self._factor(module, module.right, "a"), self._factor(module, module.left, "b")
        if b.shape[1] != a.shape[0]:
            raise self.misfit(module, f"have ranks {a.shape[0]} and {b.shape[1]}")
        if len(module.a.shape) > 2:
            whole = (b.shape[0], *module.a.shape[1:])
            if trimmed(whole) != trimmed(entry.shape) or math.prod(module.b.shape[2:]) != 1:
                groups = _groups(whole, entry)
                raise self.misfit(module, f"give {list(whole)}, and {tensor} is {list(entry.shape)}{groups}")
            return b, a, True
        stored = trimmed(entry.shape)
        plain, turned = (b.shape[0], a.shape[1]) == stored, (a.shape[1], b.shape[0]) == stored
        if not plain and not turned:
            sizes = f"{b.shape[0]} outputs and {a.shape[1]} inputs"
            raise self.misfit(module, f"are for {sizes}, and {tensor} is {list(entry.shape)}")
        if module.embedding:
            if not turned:
                raise self.misfit(module, f"are for a table of {a.shape[1]} rows, and {tensor} is {list(entry.shape)}")
        elif plain and turned:
            turned = self._is_transposed(module, tensor)
        if not turned:
            return b, a, True
        return _transposed(a), _transposed(b), self._is_table(module, tensor)

    def _is_transposed(self, module: Module, tensor: str) -> bool:
        """Whether a square weight is stored as inputs x outputs; fan_in_fan_out decides if the base does not."""
        if self._is_table(module, tensor):
            return True
        role = self.roles[tensor]
        decided = role.kind is Kind.LINEAR and not role.reason.startswith("assumed")
        return role.in_axis == 0 if decided else self._settings.transposed

    def _is_table(self, module: Module, tensor: str) -> bool:
        """Whether factors are those of a table in mlx-lm's form, which has no names of its own for them."""
        return module.turned and self.roles[tensor].kind is Kind.EMBEDDING

    def stack_is_transposed(self, stack: str) -> bool | None:
        """Whether the matrices of a stack are stored as inputs x outputs; None if it is not known as linear."""
        role = self.roles[stack]
        return role.in_axis == 0 if role.kind is Kind.LINEAR else None

    def _factor(self, module: Module, factor: Matrix, side: str) -> Matrix:
        blocks = self._settings.blocks
        if blocks is not None and any(part in module.name for part in (blocks.a if side == "a" else blocks.b)):
            rows = factor.shape[0]
            if rows % blocks.count:
                raise self.misfit(module, f"have {rows} rows, which {blocks.count} blocks do not divide")
            return replace(factor, blocks=blocks.count)
        return factor

    def misfit(self, module: Module, text: str) -> CheckpointError:
        """The error of factors whose shapes are not those of the tensor that they name."""
        return CheckpointError(
            f"{self._files.file}: the factors of {module.name} {text}, in {self._base.path}; name the model that the "
            "adapter is for"
        )

    def no_fit(self, module: Module, where: str) -> CheckpointError:
        """The error of factors for a module of which the base has no tensor."""
        shapes: Mapping[str, list[int]] = {
            name: list(entry.shape) for name, entry in self._base.tensors.items() if name.startswith(f"{where}.")
        }
        there = ", ".join(f"{name} {shape}" for name, shape in list(shapes.items())[:4])
        sizes = f"A {list(module.a.shape)}, B {list(module.b.shape)}"
        return CheckpointError(
            f"{self._files.file}: the factors of {module.name} ({sizes}) fit nothing of {where} in {self._base.path} "
            f"({there or 'which has no tensors'}); {self._files.merged_elsewhere}"
        )


def _transposed(factor: Matrix) -> Matrix:
    """The factor with its axes exchanged. Of blocks there are no transposed ones: weights stored so have none."""
    return replace(factor, transposed=not factor.transposed)


def _groups(whole: tuple[int, ...], entry: TensorEntry) -> str:
    return " (grouped convolutions cannot be merged)" if len(whole) == len(entry.shape) else ""
