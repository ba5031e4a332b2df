"""Means along great circles: slerp, nuslerp, multislerp, karcher. All of them lie in the span of the inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pymerge.common.shapes import Axis
from pymerge.errors import ArgumentError
from pymerge.methods.actions import Action, scaled
from pymerge.methods.base import BaseOptional, Method, Parameter, Values
from pymerge.methods.linear import WEIGHT, normalised
from pymerge.methods.rows import Vectors
from pymerge.methods.span import InSpan, norms

_SLERP_LINEAR = 0.9995  # |cos| above which slerp interpolates linearly
_SLERP_NORM = 1e-8  # a norm up to here counts as 1
_NUSLERP_NORM = 1e-7  # least norm
_NUSLERP_LINEAR = 2.0**-24  # sin^2 up to which nuslerp is linear: float32 rounds 1 - cos^2 to 0 there
_BALANCED = 1e-6  # weights whose sum is smaller stand for a half each


@dataclass(frozen=True)
class SlerpSum(InSpan):
    """( sin((1-t) th) W_0 + sin(t th) W_1 ) / sin th."""

    t: float = 0.5
    label: ClassVar[str] = "slerp"
    which: ClassVar[Vectors] = Vectors(with_base=True)

    def weights(self, dots: NDArray[Any]) -> NDArray[Any]:
        lengths = norms(dots)
        lengths = np.where(lengths > _SLERP_NORM, lengths, 1.0)
        cos = (dots[:, 0, 1] / lengths.prod(-1)).clip(-1.0, 1.0)
        return _on_arc(cos, abs(cos) > _SLERP_LINEAR, self.t)


@dataclass(frozen=True)
class NuSlerpSum(InSpan):
    """slerp of two models, or of two task vectors, whole or for each row or column."""

    t: float = 0.5
    on_deltas: bool = False
    label: ClassVar[str] = "nuslerp"

    @property
    def vectors(self) -> Vectors:
        return Vectors(on_base=self.on_deltas)

    def weights(self, dots: NDArray[Any]) -> NDArray[Any]:
        lengths = norms(dots).clip(min=_NUSLERP_NORM)
        cos = (dots[:, 0, 1] / lengths.prod(-1)).clip(-1.0, 1.0)
        return _on_arc(cos, 1.0 - cos**2 <= _NUSLERP_LINEAR, self.t)


def _on_arc(cos: NDArray[Any], linear: NDArray[Any], t: float) -> NDArray[Any]:
    """Weights of two vectors [G, 2], t of the way along the arc between them, or along the line."""
    angle = np.arccos(np.where(linear, 0.0, cos))[:, None]
    parts = np.array([1.0 - t, t])
    return np.where(linear[:, None], parts, np.sin(angle * parts) / np.sin(angle))


@dataclass(frozen=True)
class MultiSlerpSum(InSpan):
    """mhat * sum_t w_t ||v_t||, mhat the direction of sum_t w_t v_t / ||v_t||."""

    shares: tuple[float, ...] = ()
    eps: float = 1e-8
    on_deltas: bool = False
    label: ClassVar[str] = "multislerp"

    @property
    def vectors(self) -> Vectors:
        return Vectors(on_base=self.on_deltas)

    def weights(self, dots: NDArray[Any]) -> NDArray[Any]:
        shares = np.array(self.shares)
        lengths = norms(dots)[0]
        units = shares / (lengths + self.eps)
        mean = math.sqrt(max(0.0, units @ dots[0] @ units))
        if mean < self.eps:
            if len(self.shares) == 2 or not lengths.any():
                return shares[None]
            raise ArgumentError(
                f"multislerp: the directions cancel (their weighted mean has length {mean:g}); change a weight, or "
                "leave one of the models out"
            )
        # The tangent vectors at mhat add up to sum_t w_t u_t - |m| mhat = 0: what the exponential map leaves is
        # cos(0 + eps).
        weights: NDArray[Any] = units * float(math.cos(self.eps) / mean * (shares @ lengths))
        return weights[None]


@dataclass(frozen=True)
class KarcherSum(InSpan):
    """Mean on the unit sphere by Newton steps in the tangent space, times the mean norm."""

    max_iter: int = 10
    tol: float = 1e-5
    with_base: bool = False
    label: ClassVar[str] = "karcher"

    @property
    def vectors(self) -> Vectors:
        return Vectors(with_base=self.with_base)

    def weights(self, dots: NDArray[Any]) -> NDArray[Any]:
        lengths = norms(dots)[0]
        if not np.isfinite(lengths).all():
            return np.full((1, len(lengths)), math.nan)
        kept = lengths > self.tol
        if not kept.any():
            return np.zeros((1, len(lengths)))
        units = np.where(kept, 1.0 / np.where(kept, lengths, 1.0), 0.0)
        cosines = dots[0] * units * units[:, None]
        alphas = kept / kept.sum()
        mean = alphas / _length(alphas, cosines)
        if _length(alphas, cosines) < self.tol:  # no direction: the first model's
            mean = np.zeros_like(alphas)
            mean[kept.argmax()] = 1.0
        for _ in range(self.max_iter):
            step = self._step(mean, alphas, cosines)
            length = _length(step, cosines)
            if length < self.tol:
                break
            mean = math.cos(length) * mean + math.sin(length) / length * step
            mean = mean / _length(mean, cosines)
        weights: NDArray[Any] = mean * units * lengths.mean()
        return weights[None]

    def _step(self, mean: NDArray[Any], alphas: NDArray[Any], cosines: NDArray[Any]) -> NDArray[Any]:
        """The mean of the tangent vectors at `mean` that lead to each unit vector, as weights of these."""
        cos = (cosines @ mean).clip(-1.0, 1.0)
        angles = np.arccos(cos)
        opposite = (angles > math.pi - self.tol) & (alphas > 0.0)
        if opposite.any():
            raise ArgumentError(
                f"karcher: model {opposite.argmax()} (from 0) points away from the mean, and no way from the "
                "one to the other is shorter than the rest; leave that model out"
            )
        near = (angles < self.tol) | (alphas == 0.0)
        moves = np.where(near, 0.0, alphas * angles / np.sin(np.where(near, 1.0, angles)))
        step: NDArray[Any] = moves - (moves @ cos) * mean
        return step


def _length(weights: NDArray[Any], cosines: NDArray[Any]) -> float:
    """The norm of a weighted sum of unit vectors."""
    return math.sqrt(max(0.0, float(weights @ cosines @ weights)))


class Slerp(Method):
    """One great circle through the base and a model; nearly parallel or opposite tensors are interpolated linearly.

    W = ( sin((1-t) th) W_0 + sin(t th) W_1 ) / sin th with cos th = <W_0, W_1> / (||W_0|| ||W_1||), each tensor as one
    vector, a norm of at most 1e-8 taken as 1; (1-t) W_0 + t W_1 where |cos th| > 0.9995.
    """

    name = "slerp"
    summary = "along the great circle from the base (t = 0) to one model (t = 1)"
    source = "Shoemake, SIGGRAPH 1985; mergekit"
    most_experts = 1
    parameters = (Parameter("t", "number", 0.5, "0: the base, 1: the model", required=True),)

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        return SlerpSum(t=values.merge["t"])


class NuSlerp(BaseOptional):
    """slerp of two models, of their task vectors where a base is named; t = w_2 / (w_1 + w_2).

    t is 1/2 where |w_1 + w_2| < 1e-6. Norms count as 1e-7 at least. Linear where sin^2 th <= 2^-24. Each tensor is one
    vector; with `nuslerp_flatten: false` each row along the last axis, or (`nuslerp_row_wise`) each column along the
    first is.
    """

    name = "nuslerp"
    summary = "slerp of two models (with a base: of their task vectors), whole or by rows or columns"
    source = "mergekit"
    least_experts = 2
    most_experts = 2
    parameters = (
        WEIGHT,
        Parameter("nuslerp_flatten", "flag", True, "a tensor is one vector"),
        Parameter("nuslerp_row_wise", "flag", False, "not flattened: vectors along the first axis, not the last"),
    )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        first, second = values.model["weight"]
        balanced = abs(first + second) < _BALANCED
        axis: Axis = "columns" if values.merge["nuslerp_row_wise"] else "rows"
        return NuSlerpSum(
            axis="whole" if values.merge["nuslerp_flatten"] else axis,
            t=0.5 if balanced else second / (first + second),
            on_deltas=self.needs_base,
        )


class MultiSlerp(BaseOptional):
    """Barycentre on the sphere of any number of models, of their task vectors where a base is named.

    u_t = v_t / (||v_t|| + eps), m = sum_t w_t u_t, W = cos(eps) m / ||m|| * sum_t w_t ||v_t||. The tangent step of the
    source at m / ||m|| is exactly 0, since sum_t w_t u_t has no part orthogonal to m. Where ||m|| < eps: the weighted
    sum for two models, and where all v_t are 0; otherwise an error. One model is returned as it is.
    https://goddard.blog/posts/multislerp-wow-what-a-cool-idea
    """

    name = "multislerp"
    summary = "mean direction of the models (with a base: of the task vectors) with their mean norm"
    source = "Goddard, Multi-SLERP; mergekit"
    parameters = (
        WEIGHT,
        Parameter("normalize_weights", "flag", True, "divide the weights by their sum"),
        Parameter("eps", "number", 1e-8, "added to norms; below it a mean direction is none", above=0.0),
    )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        if experts == 1:
            return scaled()
        weights = values.model["weight"]
        shares = normalised(weights) if values.merge["normalize_weights"] else weights
        return MultiSlerpSum(shares=shares, eps=values.merge["eps"], on_deltas=self.needs_base)


class Karcher(BaseOptional):
    """Riemannian centre of mass of the models on the sphere, times their mean norm; a base is a model like the others.

    From u = the normalised mean of u_t = W_t / ||W_t|| (norms up to `tol` are left out): with th_t = arccos <u_t, u>,
    v = mean_t th_t / sin th_t (u_t - cos th_t u), u <- cos ||v|| u + sin ||v|| v / ||v||, until ||v|| < tol.
    W = u * mean_t ||W_t|| over all models.
    """

    name = "karcher"
    summary = "Karcher mean of the models on the sphere (a base counts as a model), with their mean norm"
    source = "mergekit; arXiv 2603.04972"
    parameters = (
        Parameter("max_iter", "integer", 10, "most steps", minimum=0),
        Parameter("tol", "number", 1e-5, "length of a step, angle and norm that count as 0", above=0.0),
    )

    def action(self, name: str, solvable: bool, values: Values, experts: int) -> Action:
        if experts == 1 and not self.needs_base:
            return scaled()
        return KarcherSum(max_iter=values.merge["max_iter"], tol=values.merge["tol"], with_base=self.needs_base)


METHODS = (Slerp(), NuSlerp(), MultiSlerp(), Karcher())
