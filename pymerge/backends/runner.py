"""Which function computes an op: reference (PyTorch), native (C++), triton or cuda, and why that one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pymerge.backends import measured
from pymerge.common.devices import Device, check_device
from pymerge.common.events import event
from pymerge.errors import BackendError
from pymerge.ops import OPS

BACKENDS = ("reference", "native", "triton", "cuda")

# Ops whose functions take batches of layers. Others are called for each layer; the references take batches themselves.
_TAKE_BATCHES = {"triton": ("task_gram", "wudi_adam"), "cuda": ("task_gram", "wudi_adam")}

_NOT_MEASURED = (
    "PyTorch on the device: nobody has timed ours at such a shape on a {device}; --backend triton or cuda selects them"
)


class Backend(Protocol):
    """What each module of this package offers."""

    NAME: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why the backend cannot compute on this device, with the remedy; None if it can."""

    def implementations(self) -> Mapping[str, Callable[..., Any]]:
        """The ops it implements; signatures are those of the references."""

    def refuses(self, op: str, dtypes: frozenset[torch.dtype]) -> str | None:
        """Why it does not compute this op in these dtypes; None if it does."""


@dataclass(frozen=True)
class Choice:
    """The function that computes an op, and why it was chosen."""

    op: str
    backend: str
    function: Callable[..., Any]
    reason: str


def load(name: str) -> Backend:
    """The module of a backend; BackendError if there is none of this name."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; choose auto, {', '.join(BACKENDS)}")
    return cast(Backend, importlib.import_module(f"pymerge.backends.{name}"))


def check_backend(name: str, device: torch.device) -> None:
    """Raise BackendError unless the named backend (or auto) and the device can be used here."""
    check_device(device)
    if name != "auto":
        reason = load(name).unavailable(device)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot be used: {reason}")


def choose(
    op: str, device: torch.device, dtypes: frozenset[torch.dtype], wanted: str = "auto", shape: tuple[int, ...] = ()
) -> Choice:
    """Choose the function of an op.

    Args:
        op: a name of pymerge.ops.OPS.
        device: where the tensors are.
        dtypes: dtypes of tensors and of the result asked for.
        wanted: a backend's name, or "auto": native on a CPU; on CUDA the fastest by pymerge.backends.measured, and
            PyTorch where nothing has been measured.
        shape: of the layer, d_out x d_in, or of a batch of layers.

    Raises BackendError if a backend is named that does not exist or cannot run here. An op or dtype that the
    named backend does not implement falls to the reference, and `reason` says so.
    """
    if op not in OPS:
        raise BackendError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
    check_backend(wanted, device)
    if wanted != "auto":
        return _from(wanted, op, dtypes, shape, "named")
    if device.type == "cuda":
        return _measured(op, device, torch.cuda.get_device_name(device), dtypes, shape)
    missing = load("native").unavailable(device)
    if missing is not None:
        return _from("reference", op, dtypes, shape, f"the C++ backend cannot be used: {missing}")
    return _from("native", op, dtypes, shape, "the C++ backend is the fastest on a CPU")


def _measured(
    op: str, device: torch.device, name: str, dtypes: frozenset[torch.dtype], shape: tuple[int, ...]
) -> Choice:
    # A batch is computed by what computes its layers alone: how many are together depends on the memory that is free,
    # and must not change a bit.
    is_batch = OPS[op].each_layer is not None and len(shape) == 3
    row = measured.nearest(name, op, dtypes, shape[1:] if is_batch else shape)
    if row is None:
        return _reference(op, _NOT_MEASURED.format(device=name))
    missing = load(row.backend).unavailable(device)
    if missing is not None:
        return _reference(op, f"{row.backend} was measured as the fastest, and cannot be used: {missing}")
    return _from(row.backend, op, dtypes, shape, f"{row.speedup:.2f} times PyTorch's speed, measured {row.source}")


def _from(name: str, op: str, dtypes: frozenset[torch.dtype], shape: tuple[int, ...], reason: str) -> Choice:
    backend = load(name)
    implementations = backend.implementations()
    if op not in implementations:
        return _reference(op, f"{name} has no {op} of its own: it is made of library calls")
    refusal = backend.refuses(op, dtypes)
    if refusal is not None:
        return _reference(op, f"{name} does not compute it: {refusal}")
    function, each_layer = implementations[op], OPS[op].each_layer
    if each_layer is not None and len(shape) == 3 and name != "reference" and op not in _TAKE_BATCHES.get(name, ()):
        return Choice(op, name, partial(each_layer, function), reason)
    return Choice(op, name, function, reason)


def _reference(op: str, reason: str) -> Choice:
    return Choice(op, "reference", OPS[op].reference, reason)


class Dispatcher:
    """Calls ops by name on one backend and device: check, choose (once for each op, dtypes and shape), compute.

    Raises BackendError at construction if the backend or device cannot be used, ArgumentError from a call
    whose arguments do not fit together. `choices` tells what computed each op last; each reason is logged once.
    """

    def __init__(self, backend: str = "auto", device: torch.device | Device | str = "cpu") -> None:
        self.backend = backend
        self.device = torch.device(str(device))
        self.choices: dict[str, Choice] = {}
        self._by_call: dict[tuple[str, frozenset[torch.dtype], tuple[int, ...]], Choice] = {}
        self._logged: set[tuple[str, str, str]] = set()
        check_backend(backend, self.device)

    def __call__(self, op: str, /, *args: Any, **kwargs: Any) -> Any:
        if op not in OPS:
            raise BackendError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
        OPS[op].check(*args, **kwargs)
        key = (op, *_what(op, args, kwargs))
        choice = self._by_call.get(key)
        if choice is None:
            choice = self._by_call[key] = choose(op, self.device, key[1], self.backend, key[2])
            said = (op, choice.backend, choice.reason)
            if said not in self._logged:
                self._logged.add(said)
                text = f"{op}: backend {choice.backend} ({choice.reason})"
                event("backend_chosen", text, op=op, backend=choice.backend, reason=choice.reason)
        self.choices[op] = choice
        return choice.function(*args, **kwargs)


def _what(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[frozenset[torch.dtype], tuple[int, ...]]:
    """(dtypes, shape of the layer) of a call."""
    named = dict(zip(OPS[op].parameters, args, strict=False)) | kwargs
    named.pop("weights", None)  # numbers, even where a batch's are a float64 tensor
    # W_0, B or R are d_out x d_in. Where an op has none of them, its first tensor is.
    tensors = [named[name] for name in ("base", "B", "R") if isinstance(named.get(name), Tensor)]
    tensors = tensors or list(_tensors(named.values()))
    # Indices and masks are of one integer type in each op.
    dtypes = frozenset(dtype for dtype in _dtypes(named.values()) if dtype.is_floating_point)
    return dtypes, tuple(tensors[0].shape)


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _dtypes(values: Iterable[Any]) -> Iterable[torch.dtype]:
    for value in values:
        if isinstance(value, torch.dtype):
            yield value
        else:
            yield from (tensor.dtype for tensor in _tensors([value]))


def describe() -> list[tuple[str, bool, str]]:
    """(backend, works here, ops or the reason why not), for `pymerge env`."""
    rows = []
    for name in BACKENDS:
        backend = load(name)
        device = torch.device("cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu")
        reason = backend.unavailable(device)
        rows.append((name, reason is None, reason or ", ".join(backend.implementations())))
    return rows
