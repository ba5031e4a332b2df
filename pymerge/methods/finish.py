"""Passes behind a method, on what it adds to the base: calibrated, boosted, and scaled layer by layer.

Any method on task vectors can have them, in this order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from pymerge.common.arrays import as_tensor
from pymerge.errors import ArgumentError
from pymerge.methods.actions import Action, Combine, Run, Solve
from pymerge.methods.base import PASSES, Method, Values
from pymerge.methods.delta import SolveTrimmedByAll
from pymerge.methods.kept import add_to_base
from pymerge.methods.reduce import Reduce, merge_whole
from pymerge.methods.rows import Rows
from pymerge.ops.boost import Boost
from pymerge.ops.calibrate import Calibrate

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Finish(Solve):
    """W_0 + scale * X', X' what becomes of the X that another action adds to the base."""

    inner: Action
    calibrate: float | None = None  # alpha
    boost: float | None = None  # beta
    # With a power, scale follows from the norms of all X' of a kind, which must be known before: `scales`.
    power: float = 0.0
    kind: str = ""
    scale: float = 1.0
    bare: bool = False  # the result is scale * X', without W_0

    @property
    def label(self) -> str:
        passes = ["svc"] * (self.calibrate is not None) + ["boost"] * (self.boost is not None)
        scaled = ["layer scale"] * (self.power != 0.0 or self.scale != 1.0)
        return " + ".join([self.inner.label, *passes, *scaled])

    @property
    def takes_stacks(self) -> bool:
        """Whether it needs all matrices of a stack at once."""
        return isinstance(self.inner, Reduce)

    @property
    def measured(self) -> bool:
        """Whether the norms of all layers must be known before a tensor is merged."""
        return self.power != 0.0

    @property
    def beforehand(self) -> int:
        return int(self.measured)

    def merged(self, run: Run, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """Result of the inner action on whole tensors as they are stored, in float64; only if that is no Solve."""
        action, double = self.inner, [expert.double() for expert in experts]
        rows = Rows(base.double(), double, "F64")
        if isinstance(action, Reduce):
            return as_tensor(merge_whole(action, run, rows))
        return as_tensor(run(action.op(rows)))  # type: ignore[attr-defined]

    def run(self, run: Run, base: Tensor, experts: Sequence[Tensor], out_dtype: str) -> Tensor:
        if isinstance(self.inner, Solve):
            merged = self.inner.run(run, base, experts, "F64")
        else:
            merged = self.merged(run, base, experts)
        return self.finished(run, base, [merged, *experts], out_dtype)

    def finished(self, run: Run, base: Tensor, tensors: Sequence[Tensor], out_dtype: str) -> Tensor:
        """The result of a matrix from what the inner action makes of it, in float64, and the experts."""
        if self.measured:
            raise ArgumentError(
                "layer_scale: {power: p} needs the norms of all layers, which nobody measures here; merge into a "
                "model, or give layer_scale: {lines: [a, b]}"
            )
        merged, *experts = tensors
        X = merged - base.double()
        if bool(X.isfinite().all()):
            X = X if self.calibrate is None else run(Calibrate(X, base, experts, self.calibrate))
            # Behind it: what is boosted has equal singular values, of which no direction could be calibrated.
            X = X if self.boost is None else run(Boost(X, self.boost))
        if self.bare:
            return X * self.scale
        return add_to_base(base, X, self.scale, out_dtype)

    def measuring(self) -> Finish:
        """The action that gives the X' whose norm is to be known."""
        return replace(self, power=0.0, bare=True)

    def scaled_by(self, scale: float) -> Finish:
        """The action, now that the scale of its layer is known."""
        return replace(self, power=0.0, kind="", scale=scale)

    def flops(self, shape: tuple[int, ...], experts: int) -> int:
        passes = (self.boost is not None) + (self.calibrate is not None)
        found = self.inner.flops(shape, experts)
        if passes:
            small, large = sorted(shape)
            found += passes * (4 * small**2 * large + 9 * small**3)
            found += 2 * experts * small**2 * large * (self.calibrate is not None)
        return found * (1 + self.measured)

    def scratch(self, shape: tuple[int, ...], experts: int, native: bool) -> int:
        numel, small = math.prod(shape), min(shape, default=1)
        # In float64: what was merged, X, X', and for the passes vectors of both sides, a task vector, what it answers,
        # and LAPACK's work.
        own = 8 * (3 * numel + (6 * numel + 8 * small**2) * (self.boost is not None or self.calibrate is not None))
        return own + self.inner.scratch(shape, experts, native)

    def beside(self, numel: int, experts: int) -> int:
        """Bytes that so many elements take whatever their matrices do: inputs in float64, and a result to measure."""
        return 8 * numel * ((0 if isinstance(self.inner, Solve) else experts + 2) + self.measured)

    @property
    def bytes_beside(self) -> int:  # type: ignore[override]
        return self.inner.bytes_beside if isinstance(self.inner, Solve) else 0

    def check_shape(self, shape: tuple[int, int], experts: int) -> None:
        if isinstance(self.inner, Solve):
            self.inner.check_shape(shape, experts)


def act(
    method: Method,
    name: str,
    solvable: bool,
    values: Values,
    experts: int,
    *,
    kernel: bool,
    kind: str,
    position: float | None,
) -> Action:
    """The action of a method for one tensor, with the passes that its parameters ask for.

    Args:
        name, solvable, values, experts: as of `Method.action`.
        kernel: whether it is the weight of a convolution (pymerge.architecture.roles).
        kind: name of the tensor without the number of its block: the same for all layers that are scaled together.
        position: of its block, 0 to 1, 0 outside of blocks; None where the other tensors of the model are not known.

    Raises:
        ArgumentError: passes that cannot be had.
    """
    own = method.kernel_action(name, values) if kernel else None
    action = own or method.action(name, solvable, values, experts)
    given = {each.name: values.merge.get(each.name, each.default) for each in PASSES}
    asked = [each.name for each in PASSES if each.only_with is None and given[each.name] != "none"]
    if not asked:
        return action
    if not method.needs_base:
        raise ArgumentError(
            f"{asked[0]!r} is for what a merge adds to a base, and {method.name!r} has none; "
            f"choose a method on task vectors, as task_arithmetic is, or delete {asked[0]!r}"
        )
    if isinstance(action, Combine) and not action.weights and action.on_base:
        return action
    _check_alone(method, action, asked[0])
    scale, power = _layer_scale(given["layer_scale"], position)
    if solvable and (given["boost"] != "none" or given["calibrate"] != "none" or power != 0.0):
        beta = None if given["boost"] == "none" else float(given["boost"])
        alpha = None if given["calibrate"] == "none" else float(given["calibrate_alpha"])
        return Finish(action, alpha, beta, power, kind if power else "", scale)
    return _scaled(action, scale)


def _layer_scale(given: Any, position: float | None) -> tuple[float, float]:
    """A factor that is known, and the power of one that is not."""
    if given == "none":
        return 1.0, 0.0
    if position is None:
        raise ArgumentError("layer_scale needs the layers of a whole model; merge it as one, or delete layer_scale")
    rule, *numbers = given
    if rule == "power":
        return 1.0, numbers[0]
    return numbers[0] + numbers[1] * position, 0.0


def _scaled(action: Action, scale: float) -> Action:
    """The action whose X is so many times as large."""
    if scale == 1.0:
        return action
    if isinstance(action, Combine) and action.on_base:
        return replace(action, weights=tuple(scale * weight for weight in action.weights))
    if is_dataclass(action) and any(each.name == "scale" for each in fields(action)):
        changed: Action = replace(action, scale=scale * action.scale)
        return changed
    return Finish(action, scale=scale)


def _check_alone(method: Method, action: Action, asked: str) -> None:
    if isinstance(action, Reduce):
        of_model = action.scope == "model"
    else:
        of_model = isinstance(action, Solve) and action.of_model
        of_model |= isinstance(action, SolveTrimmedByAll) and action.kept_of_all is not None
    if of_model:
        scopes = [each for parameter in method.parameters if parameter.name == "scope" for each in parameter.choices]
        narrower = " or ".join(f"scope: {each}" for each in scopes if each != "model")
        raise ArgumentError(
            f"{asked!r} works on each tensor, and scope: model on all of them together; give {narrower}, or delete "
            f"{asked!r}"
        )


def scales(layers: Mapping[str, tuple[Finish, float]]) -> dict[str, float]:
    """The scale of each layer, from its action and the squared norm of its X'.

    (||X'|| / mean of its kind)^power, divided by what keeps the sum of the squared norms of the kind. Layers that
    nothing is added to count for nothing.
    """
    kinds: dict[tuple[str, float], dict[str, float]] = {}
    for name, (action, square) in layers.items():
        if square > 0.0:
            kinds.setdefault((action.kind, action.power), {})[name] = math.sqrt(square)
    found = dict.fromkeys(layers, 1.0)
    for (_, power), norms in kinds.items():
        mean = math.fsum(norms.values()) / len(norms)
        largest = max(norms.values(), key=lambda norm: power * math.log(norm / mean))
        raised = {name: (norm / largest) ** power for name, norm in norms.items()}  # at most 1
        before = math.fsum(norm**2 for norm in norms.values())
        after = math.fsum((raised[name] * norm) ** 2 for name, norm in norms.items())
        found |= {name: factor * math.sqrt(before / after) for name, factor in raised.items()}
    return found
