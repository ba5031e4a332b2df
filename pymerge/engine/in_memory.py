"""The Python interface to merges in memory: `merge_tensors`, `merge_state_dicts`. Imports PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pymerge.architecture.buffers import constant as named_constant
from pymerge.architecture.constants import may_be_constant
from pymerge.architecture.roles import Kind, Role, Rule, classify, positions
from pymerge.backends.runner import Runner
from pymerge.checkpoint.finite import check_values, is_finite
from pymerge.common.arrays import compute_code
from pymerge.common.devices import resolve_device
from pymerge.common.dtypes import CODES, MERGED, code_of, torch_dtype
from pymerge.common.names import nearest
from pymerge.engine.informed import InMemory, informed
from pymerge.engine.state_dicts import check_integers, check_plain
from pymerge.engine.whole import Share, merge_whole, reduce_together
from pymerge.errors import ArgumentError, NonFiniteError
from pymerge.methods import get_method
from pymerge.methods.actions import Action
from pymerge.methods.base import Method, Values
from pymerge.methods.finish import act
from pymerge.methods.reduce import Reduce
from pymerge.methods.rows import Rows
from pymerge.planner.constants import reproduces
from pymerge.planner.grams import with_grams


def merge_tensors(
    base: Tensor | None,
    experts: Sequence[Tensor],
    method: str = "wudi",
    *,
    device: str | torch.device | None = None,
    backend: str = "auto",
    dtype: torch.dtype | str | None = None,
    in_axis: int = 1,
    **parameters: Any,
) -> Tensor:
    """Merge one weight.

    Args:
        base: W_0: d_out x d_in for a linear weight, E x d_out x d_in for a stack of them; any other shape is treated
            as a tensor that is no linear weight (a bias, a norm). None for methods that do without.
        experts: T tensors W_t of the base's shape.
        method: a name of `pymerge methods`.
        device: where to compute; default: where the base is. The result returns to the base's device.
        backend: as in `merge`.
        dtype: of the result; default: the base's.
        in_axis: axis of the inputs in each matrix: 1 for nn.Linear, 0 for GPT-2's Conv1D.
        parameters: the method's; for one with a value for each model, a number or a sequence of T numbers.
            "lambda" may be spelt lambda_.

    Returns:
        W_0 + scale * X (or the average, for methods that average), of the base's shape.

    Raises:
        ArgumentError: shapes, dtypes, devices or parameters that do not fit.
        NonFiniteError: an input holds NaN or infinity, or the result would.
    """
    if in_axis not in (0, 1):
        raise ArgumentError(f"in_axis is {in_axis!r}; give 1 (d_out x d_in) or 0 (d_in x d_out)")
    if not experts:
        raise ArgumentError("no experts were given; pass at least one")
    like = experts[0] if base is None else base
    kind = Kind.LINEAR if like.ndim in (2, 3) else Kind.OTHER
    role = Role(kind, in_axis, stacked=like.ndim == 3, kernel=like.ndim in (4, 5) and like.shape[1] > 1)
    merger = _Merger(method, parameters, len(experts), device or like.device, backend, with_base=base is not None)
    (tensor,) = merger.informed([merger.prepared("the tensor", role, like, experts, _dtype(dtype))])
    return merger.finished(tensor, merger.reduced([tensor]))


def merge_state_dicts(
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    method: str = "wudi",
    *,
    device: str | torch.device | None = None,
    backend: str = "auto",
    rules: Sequence[Rule] = (),
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merge whole models in memory, tensor by tensor.

    Args:
        base: name -> tensor. Names and shapes decide what each tensor is (see pymerge.architecture.roles).
        experts: T mappings with the same names and shapes.
        method, device, backend, parameters: as in `merge_tensors`.
        rules: what tensors are, against names and shapes, as `layers` of a config.

    Returns:
        The base's names with merged tensors, in the base's dtypes and on its devices. Integers are the base's, and so
        are masks and other small tensors that are no weights, where all models have the same.

    Raises:
        ArgumentError: names, shapes, dtypes or parameters that do not fit; quantised weights; integers that
            differ between the models, but for counters of training (num_batches_tracked).
        NonFiniteError: an input holds NaN or infinity, or the result would; the message names the tensor.
    """
    check_plain("the base", base)
    if isinstance(experts, Mapping):
        raise ArgumentError("experts is one mapping; pass a list of them, one for each expert")
    for index, expert in enumerate(experts):
        check_plain(f"expert {index}", expert)
        missing = [name for name in base if name not in expert]
        extra = [name for name in expert if name not in base]
        if missing or extra:
            raise ArgumentError(
                f"expert {index} has other tensors than the base: missing {missing[:3]}, extra {extra[:3]}; "
                "pass state dicts of the same architecture"
            )
    described = {name: (code_of(tensor.dtype), tuple(tensor.shape)) for name, tensor in base.items()}
    roles = classify(described, {}, rules)
    check_integers(base, experts, roles)
    where = device or next((tensor.device for tensor in base.values()), torch.device("cpu"))
    merger = _Merger(method, parameters, len(experts), where, backend, positions=positions(roles, {}))
    merger.check_grams(base)
    tensors = [
        merger.prepared(name, roles[name], tensor, [expert[name] for expert in experts], None)
        for name, tensor in base.items()
    ]
    tensors = merger.informed(tensors)
    states = merger.reduced(tensors)
    return {tensor.name: merger.finished(tensor, states) for tensor in tensors}


class _Merger:
    """One method with its parameters on one device, for tensors that are in memory."""

    def __init__(
        self,
        method: str,
        parameters: Mapping[str, Any],
        experts: int,
        device: str | torch.device,
        backend: str,
        *,
        with_base: bool = True,
        positions: Mapping[str, float] | None = None,
    ) -> None:
        """`positions` are those of the tensors among blocks, where all of a model are known."""
        if experts == 0:
            raise ArgumentError("no experts were given; pass at least one")
        self._method = get_method(method).given(with_base)
        if self._method.needs_base and not with_base:
            raise ArgumentError(f"method {method!r} works on differences to a base, and base is None; pass the base")
        if wrong := self._method.wrong_count([f"expert {index}" for index in range(experts)]):
            raise ArgumentError(wrong)
        self._values = _values(self._method, parameters, experts)
        self._run = Runner(backend, resolve_device(device))
        self._positions = positions or {}

    def check_grams(self, base: Mapping[str, Tensor]) -> None:
        """Raise ArgumentError for Grams of tensors that the models have not: a weight without one is averaged."""
        for index, grams in enumerate(self._values.model.get("grams", ())):
            if isinstance(grams, Mapping) and (unknown := next((name for name in grams if name not in base), None)):
                near = nearest(unknown, base)
                raise ArgumentError(
                    f"grams of expert {index}: no tensor is called {unknown!r}{f'; {near} is' if near else ''}; "
                    "name each Gram as the weight whose inputs it is of"
                )

    def prepared(
        self, name: str, role: Role, base: Tensor, experts: Sequence[Tensor], dtype: torch.dtype | None
    ) -> InMemory:
        """A tensor with its action, checked; None as action stands for a buffer or a constant, which is copied."""
        if role.kind is Kind.BUFFER or self._is_constant(name, role, base, experts, dtype):
            return InMemory(name, role, None, base, experts, base.dtype)
        for index, tensor in enumerate([base, *experts]):
            owner = "the base" if index == 0 else f"expert {index - 1}"
            check_values(f"{name}: {owner}", tensor, "repair it or leave it out")
            if tensor.shape != base.shape:
                raise ArgumentError(
                    f"{name}: expert {index - 1} has shape {tuple(tensor.shape)}, the base {tuple(base.shape)}; "
                    "all must be fine-tuned from this base"
                )
        action = self._action(name, role, len(experts), tuple(base.shape))
        return InMemory(name, role, action, base, experts, dtype or base.dtype)

    def _action(self, name: str, role: Role, experts: int, shape: tuple[int, ...]) -> Action:
        grams = [[name]] * experts if self._method.needs_grams else None
        known = self._values if grams is None else with_grams(self._values, role, shape, grams, None)
        return act(
            self._method,
            name,
            role.solvable,
            known,
            experts,
            kernel=role.kernel,
            kind=role.without_block(name),
            position=self._positions.get(name),
        )

    def _is_constant(
        self, name: str, role: Role, base: Tensor, experts: Sequence[Tensor], dtype: torch.dtype | None
    ) -> bool:
        """Whether all models have the same values, or it is known by its name: as in a merge of files.

        See pymerge.planner.constants.
        """
        if dtype not in (None, base.dtype) or not may_be_constant(name, role, code_of(base.dtype), base.shape):
            return False
        if not all(each.dtype == base.dtype and torch.equal(each.to(base.device), base) for each in experts):
            known = bool(named_constant(name, base.shape)) and all(each.shape == base.shape for each in experts)
            return known and not any(bool(each.isnan().any()) for each in (base, *experts))
        return reproduces(self._action(name, role, len(experts), tuple(base.shape))) or not bool(
            torch.isfinite(base).all()
        )

    def reduced(self, tensors: Sequence[InMemory]) -> dict[str, Share]:
        """The shares of the tensors that are merged by what all tensors together tell."""
        groups: dict[Action, list[InMemory]] = {}
        for tensor in sorted(tensors, key=lambda tensor: tensor.name):  # of equal elements the first are taken
            if isinstance(tensor.action, Reduce) and tensor.action.scope == "model" and tensor.base.numel():
                groups.setdefault(tensor.action, []).append(tensor)
        found: dict[str, Share] = {}
        for action, group in groups.items():
            assert isinstance(action, Reduce)
            shares = reduce_together(
                action.on(*(compute_code(tensor.base, *tensor.experts) for tensor in group)),
                self._run,
                [tensor.base.numel() for tensor in group],
                len(group[0].experts),
                [partial(self._rows, tensor) for tensor in group],
            )
            found |= {tensor.name: share for tensor, share in zip(group, shares, strict=True)}
        return found

    def informed(self, tensors: Sequence[InMemory]) -> list[InMemory]:
        """The tensors with what all of them tell."""
        return informed(tensors, self._run, self._rows, lambda tensor: self.finished(tensor, {}))

    def finished(self, tensor: InMemory, shares: Mapping[str, Share]) -> Tensor:
        """The merged tensor, on the base's device."""
        if tensor.action is None:
            return tensor.base.clone()
        try:
            merged = merge_whole(tensor.action, tensor.role, self._run, self._rows(tensor), shares.get(tensor.name))
        except ArgumentError as error:
            raise ArgumentError(f"{tensor.name}: {error}") from error
        if not is_finite(merged):
            raise NonFiniteError(
                f"{tensor.name}: the merged tensor has values that {tensor.dtype} cannot hold",
                "give smaller parameters, or tensors of a wider dtype",
            )
        return merged.to(tensor.base.device)

    def _rows(self, tensor: InMemory) -> Rows:
        base, *experts = self._moved(tensor)
        return Rows(base, experts, code_of(tensor.dtype))

    def _moved(self, tensor: InMemory) -> list[Tensor]:
        device = torch.device(str(self._run.device))
        return [each.detach().to(device) for each in (tensor.base, *tensor.experts)]


def _values(method: Method, parameters: Mapping[str, Any], experts: int) -> Values:
    """Check parameters given in Python; those not given have their defaults."""
    defaults = method.defaults(experts)
    merge, model = dict(defaults.merge), dict(defaults.model)
    for given, value in parameters.items():
        name = _bare(given)
        try:
            parameter = method.parameter(name)
        except KeyError:
            known = [p.name for p in method.all_parameters]
            near = nearest(name, known)
            hint = f"did you mean {near!r}?" if near else "it has: " + ", ".join(known)
            raise ArgumentError(f"method {method.name!r} has no parameter {given!r}; {hint}") from None
        if parameter.scope == "merge":
            merge[name] = parameter.parse(value)
            continue
        values = list(value) if isinstance(value, (list, tuple)) else [value] * experts
        if len(values) != experts:
            raise ArgumentError(f"parameter {name!r} has {len(values)} values for {experts} experts; give one for each")
        model[name] = tuple(parameter.parse(each) for each in values)
    found = {**{name: (value,) for name, value in merge.items()}, **model}
    if problem := method.clash({name: found[name] for name in map(_bare, parameters)}):
        raise ArgumentError(f"method {method.name!r}: {problem}")
    return Values(merge, model)


def _bare(given: str) -> str:
    """Name of a parameter whose keyword has an underscore where it would be a word of Python."""
    return given.rstrip("_")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.removeprefix("torch.")
    if name not in MERGED:
        raise ArgumentError(f"unknown dtype {dtype!r}; choose one of {', '.join(MERGED)}")
    return torch_dtype(CODES[name])
