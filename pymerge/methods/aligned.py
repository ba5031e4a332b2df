"""Merges in a basis that all task vectors share, made for adapters: KnOTS and Core Space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pymerge.common.shapes import key_of
from pymerge.methods.actions import Action
from pymerge.methods.base import Method, Parameter, Values
from pymerge.methods.shared_bases import SolveAligned
from pymerge.methods.solver import SHARED_PARAMETERS, SolverMethod
from pymerge.ops.isotropic import equalised
from pymerge.ops.singular_sum import leading_of_each, orthogonal_sum

if TYPE_CHECKING:
    from pymerge.methods.core.aligned import Aligned
    from pymerge.methods.core.factors import Factors
    from pymerge.methods.core.tall import Matrix


@dataclass(frozen=True)
class MergeOneSide(SolveAligned):
    """KnOTS."""

    cutoff: float
    released: bool
    label: ClassVar[str] = "knots"

    @property
    def keeps_equal(self) -> bool:
        return self.released

    def aligned(self, tasks: Sequence[Factors]) -> Aligned:
        from pymerge.methods.core.aligned import one_sided

        return one_sided(tasks, self.cutoff, self.released)

    def merged(self, parts: Sequence[Matrix]) -> Matrix:
        from pymerge.methods.core.entries import elected_mean, from_smallest, largest
        from pymerge.methods.core.factors import total_of

        if self.merge == "linear":
            total: Matrix = total_of(parts)
            return total
        if self.merge == "dare":
            return self.drawn(parts)
        if self.told is not None:
            return self.by_told(parts)
        count = int(self.density * parts[0].size)
        if self.released:
            return elected_mean([from_smallest(part, part.size - count) for part in parts])
        return elected_mean([largest(part, count) for part in parts])


@dataclass(frozen=True)
class MergeTwoSides(SolveAligned):
    """Core Space."""

    isotropic: bool
    cart_rank: float
    cart_weight: float
    label: ClassVar[str] = "core_space"

    def aligned(self, tasks: Sequence[Factors]) -> Aligned:
        from pymerge.methods.core.aligned import two_sided

        return two_sided(tasks)

    def merged(self, parts: Sequence[Matrix]) -> Matrix:
        M = self._by_rule(parts)
        if not self.isotropic:
            return M
        X: Matrix = equalised([M], 1.0, (M.shape[0], M.shape[1]))
        return X

    def _by_rule(self, parts: Sequence[Matrix]) -> Matrix:
        from pymerge.methods.core.entries import elected_mean, largest
        from pymerge.methods.core.factors import total_of

        shape = (parts[0].shape[0], parts[0].shape[1])
        if self.merge == "ties":
            if self.told is not None:
                return self.by_told(parts)
            return elected_mean([largest(part, int(self.density * part.size)) for part in parts])
        if self.merge == "dare":
            return self.drawn(parts)
        if self.merge == "tsv":
            X: Matrix = orthogonal_sum(leading_of_each(parts))
            return X
        total: Matrix = total_of(parts)
        if self.merge == "sum":
            return total
        mean = total / len(parts)
        if self.merge == "cart":
            rank = math.ceil(self.cart_rank * min(shape))
            lead: Matrix = total_of(_leading(part - mean, rank) for part in parts)
            return mean + self.cart_weight * lead
        return mean


def _leading(M: Matrix, rank: int) -> Matrix:
    """M on its leading singular directions."""
    import numpy as np

    U, s, Vh = np.linalg.svd(M, full_matrices=False)
    leading: Matrix = (U[:, :rank] * s[:rank]) @ Vh[:rank]
    return leading


def _density(default: float) -> Parameter:
    return Parameter("density", "number", default, "share of entries that ties and dare keep", minimum=0.0, maximum=1.0)


_SCOPE = Parameter(
    "scope",
    "choice",
    "layer",
    "ties: what density is a share of: each layer's entries, or those of all layers of adapters",
    choices=("layer", "model"),
)
_SEED = Parameter("random_seed", "integer", 0, "of dare's random masks; also a key of the config", minimum=0)


class Knots(SolverMethod):
    """KnOTS: the task vectors side by side, in the basis of their left singular vectors, merged entry by entry."""

    name = "knots"
    summary = "task vectors in the basis of their left singular vectors, merged there layer by layer; made for adapters"
    source = "KnOTS, arXiv 2410.19735"
    parameters = (
        Parameter("merge", "choice", "ties", "rule for what is aligned", choices=("ties", "linear", "dare")),
        _density(0.2),
        Parameter("cutoff", "number", 1e-7, "singular values below this share of the largest are dropped", minimum=0.0),
        _SCOPE,
        _SEED,
        Parameter(
            "compat",
            "choice",
            "none",
            "released: singular values above 1e-5 instead, and ties keeps all that equal its threshold",
            choices=("none", "released"),
        ),
        *SHARED_PARAMETERS,
    )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        return super().action(name, solvable, _with_keys(values, name, experts), experts)

    def solve(self, values: Values) -> Action:
        merge = values.merge
        released = merge["compat"] == "released"
        cutoff = 1e-5 if released else merge["cutoff"]
        return MergeOneSide(**_shared(values), cutoff=cutoff, released=released)


class CoreSpace(SolverMethod):
    """Core Space: task vectors between bases of all left and all right factors, merged there."""

    name = "core_space"
    summary = "task vectors between bases of all factors, merged there layer by layer; made for adapters"
    source = "Core Space, arXiv 2509.17786"
    parameters = (
        Parameter(
            "merge",
            "choice",
            "mean",
            "rule for the cores",
            choices=("mean", "sum", "ties", "dare", "tsv", "cart"),
        ),
        _density(0.1),
        Parameter("isotropic", "flag", False, "then make the singular values of the merged core equal"),
        Parameter("cart_rank", "number", 0.04, "cart: share of directions", minimum=0.0, maximum=1.0),
        Parameter("cart_weight", "number", 0.1, "cart: factor of what is beside the mean"),
        _SCOPE,
        _SEED,
        *SHARED_PARAMETERS,
    )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        return super().action(name, solvable, _with_keys(values, name, experts), experts)

    def solve(self, values: Values) -> Action:
        own = {name: values.merge[name] for name in ("isotropic", "cart_rank", "cart_weight")}
        return MergeTwoSides(**_shared(values), **own)


def _shared(values: Values) -> dict[str, Any]:
    """Arguments that both methods have."""
    return {name: values.merge[name] for name in ("scale", "merge", "density", "keys", "scope")}


def _with_keys(values: Values, name: str, experts: int) -> Values:
    """The values with keys for this tensor's random numbers, of each task; of what draws none, nothing."""
    seed, draws = values.merge["random_seed"], values.merge["merge"] == "dare"
    keys = tuple(key_of(seed, name, model) for model in range(experts)) if draws else ()
    return Values({**values.merge, "keys": keys}, values.model)


METHODS: tuple[Method, ...] = (Knots(), CoreSpace())
