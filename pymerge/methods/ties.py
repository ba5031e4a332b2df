"""mergekit's task-vector family: sparse task vectors, with or without an election of signs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from pymerge.common.shapes import key_of
from pymerge.errors import ArgumentError
from pymerge.methods.actions import Action, Elementwise, add_task_vectors
from pymerge.methods.base import Method, Parameter, Values
from pymerge.methods.linear import normalised
from pymerge.methods.masks import KeepAtRandom, KeepMagnitudes
from pymerge.methods.rows import Rows
from pymerge.ops.sparse_combine import SparseCombine

Sparsifier = Literal["magnitude", "magnitude_outliers", "random", "della_magprune"]


@dataclass(frozen=True)
class ElectSigns(Elementwise):
    """W_0 + scale * the sum, for each element, of the w_t tau_t that have the sign of sum_t w_t tau_t."""

    weights: tuple[float, ...]
    normalize: bool
    scale: float
    label: ClassVar[str] = "elect signs"

    def op(self, rows: Rows) -> SparseCombine:
        return SparseCombine(
            rows.base,
            rows.experts,
            self.weights,
            rows.out_dtype,
            elect=True,
            normalize=self.normalize,
            scale=self.scale,
            out=rows.out,
        )

    @property
    def shows_nonfinite(self) -> bool:
        return True

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        return 6 * experts * math.prod(shape)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        return SparseCombine.scratch(shape, experts, native)


class SparseMethod(Method):
    """A row of the family: which sparsifier, whether signs are elected, and what is the default."""

    def __init__(
        self,
        name: str,
        summary: str,
        source: str,
        sparsifier: Sparsifier,
        *,
        elect: bool,
        normalize: bool,
        rescale: bool,
    ) -> None:
        self.name, self.summary, self.source = name, summary, source
        self._sparsifier, self._elect = sparsifier, elect
        self.parameters = (
            Parameter("weight", "number", 1.0, "weight of this model", scope="model", required=True),
            Parameter(
                "density", "number", 1.0, "share of elements that are kept", scope="model", minimum=0.0, maximum=1.0
            ),
            *_PARAMETERS[sparsifier],
            Parameter("normalize", "flag", normalize, "divide by the sum of the weights that take part"),
            Parameter("rescale", "flag", rescale, "bring what is kept to the L1 norm of the whole task vector"),
            Parameter("lambda", "number", 1.0, "factor of the sum"),
            Parameter("int8_mask", "flag", False, "changes no number in mergekit either", no_effect=True),
        )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        weights, densities = values.model["weight"], values.model["density"]
        scale, normalize = values.merge["lambda"], values.merge["normalize"]
        if not self._elect and normalize:  # the same divisor for all elements
            weights, normalize = normalised(weights), False
        if all(density == 1.0 for density in densities):
            if self._elect:
                return ElectSigns(weights, normalize, scale)
            return add_task_vectors([scale * weight for weight in weights])
        shared = (weights, self._elect, normalize, values.merge["rescale"], scale)
        if self._sparsifier == "magnitude":
            scope = values.merge["scope"]
            return KeepMagnitudes(*shared, (0.0,) * experts, densities, False, False, scope)
        if self._sparsifier == "magnitude_outliers":
            zeroes_small = values.merge["compat"] == "mergekit"
            return KeepMagnitudes(*shared, values.model["gamma"], densities, True, zeroes_small)
        keys = tuple(key_of(values.merge["random_seed"], name, model) for model in range(experts))
        if self._sparsifier == "random":
            return KeepAtRandom(*shared, densities, densities, keys)
        ranges = [_around(*pair) for pair in zip(densities, values.model["epsilon"], strict=True)]
        lowest, highest = zip(*ranges, strict=True)
        return KeepAtRandom(*shared, lowest, highest, keys)


def _around(density: float, epsilon: float) -> tuple[float, float]:
    """The lowest and the highest probability of DELLA."""
    if density in (0.0, 1.0):
        return density, density
    lowest, highest = density - epsilon, density + epsilon
    if lowest <= 0.0 or highest >= 1.0:
        raise ArgumentError(
            f"density {density:g} with epsilon {epsilon:g} gives probabilities from {lowest:g} to {highest:g}, which "
            f"must lie between 0 and 1; choose epsilon below {min(density, 1.0 - density):g}"
        )
    return lowest, highest


_SEED = Parameter("random_seed", "integer", 0, "of the random masks; also a key of the config", minimum=0)
_PARAMETERS: dict[Sparsifier, tuple[Parameter, ...]] = {
    "magnitude": (
        Parameter(
            "scope",
            "choice",
            "tensor",
            "what density is a share of: each tensor, or the whole model, as in the paper",
            choices=("tensor", "model"),
        ),
    ),
    "magnitude_outliers": (
        Parameter(
            "gamma",
            "number",
            0.01,
            "share of elements, the largest, that are dropped",
            scope="model",
            minimum=0.0,
            maximum=1.0,
        ),
        Parameter(
            "compat",
            "choice",
            "none",
            "mergekit: drop a whole task vector if gamma drops no element of it, as before mergekit 0.1.5",
            choices=("none", "mergekit"),
        ),
    ),
    "random": (_SEED,),
    "della_magprune": (
        Parameter(
            "epsilon",
            "number",
            0.15,
            "probabilities are density - epsilon to density + epsilon",
            scope="model",
            minimum=0.0,
        ),
        _SEED,
    ),
}

_TIES, _DARE = "TIES-Merging, arXiv 2306.01708", "DARE, arXiv 2311.03099"
_BREADCRUMBS, _DELLA = "Model Breadcrumbs, arXiv 2312.06795", "DELLA-Merging, arXiv 2406.11617"
METHODS = (
    SparseMethod(
        "ties",
        "largest elements of each task vector, signs elected",
        _TIES,
        "magnitude",
        elect=True,
        normalize=True,
        rescale=False,
    ),
    SparseMethod(
        "dare_linear",
        "elements of each task vector drawn at random",
        _DARE,
        "random",
        elect=False,
        normalize=False,
        rescale=True,
    ),
    SparseMethod(
        "dare_ties",
        "elements of each task vector drawn at random, signs elected",
        _DARE,
        "random",
        elect=True,
        normalize=False,
        rescale=True,
    ),
    SparseMethod(
        "della",
        "elements drawn at random, larger ones more often, signs elected",
        _DELLA,
        "della_magprune",
        elect=True,
        normalize=True,
        rescale=True,
    ),
    SparseMethod(
        "della_linear",
        "elements drawn at random, larger ones more often",
        _DELLA,
        "della_magprune",
        elect=False,
        normalize=False,
        rescale=True,
    ),
    SparseMethod(
        "breadcrumbs",
        "task vectors without their smallest and largest elements",
        _BREADCRUMBS,
        "magnitude_outliers",
        elect=False,
        normalize=False,
        rescale=False,
    ),
    SparseMethod(
        "breadcrumbs_ties",
        "task vectors without their smallest and largest elements, signs elected",
        _BREADCRUMBS,
        "magnitude_outliers",
        elect=True,
        normalize=False,
        rescale=False,
    ),
)
