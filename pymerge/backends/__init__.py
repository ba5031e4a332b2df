"""Which function computes an op: reference (PyTorch), native (C++), triton or cuda, and why that one."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from pymerge.errors import BackendError
from pymerge.logs import event
from pymerge.ops import OPS

BACKENDS = ("reference", "native", "triton", "cuda")

# What "auto" tries on a CUDA device, in this order. A kernel gets ahead of PyTorch here when it has been
# timed against it on a device.
_CUDA_ORDER = ("reference",)
_CUDA_REASON = (
    "PyTorch on the device: no kernel of ours has been timed on a device yet; --backend triton or cuda selects them"
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
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"device {str(device)!r} is not supported; choose cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise BackendError(f"device {str(device)!r} was asked for and PyTorch sees {count}; use --device cpu")
    if name != "auto":
        reason = load(name).unavailable(device)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot be used: {reason}")


def choose(op: str, device: torch.device, dtypes: frozenset[torch.dtype], wanted: str = "auto") -> Choice:
    """Choose the function of an op.

    Args:
        op: a name of pymerge.ops.OPS.
        device: where the tensors are.
        dtypes: dtypes of tensors and of the result asked for.
        wanted: a backend's name, or "auto".

    Raises BackendError if a backend is named that does not exist or cannot run here. An op or dtype that the
    named backend does not implement falls to the reference, and `reason` says so.
    """
    if op not in OPS:
        raise BackendError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
    check_backend(wanted, device)
    if wanted != "auto":
        return _from(wanted, op, dtypes, "named")
    if device.type == "cuda":
        for name in _CUDA_ORDER:
            if load(name).unavailable(device) is None and op in load(name).implementations():
                return _from(name, op, dtypes, _CUDA_REASON)
    missing = load("native").unavailable(device)
    if missing is not None:
        return _from("reference", op, dtypes, f"the C++ backend cannot be used: {missing}")
    return _from("native", op, dtypes, "the C++ backend is the fastest on a CPU")


def _from(name: str, op: str, dtypes: frozenset[torch.dtype], reason: str) -> Choice:
    backend = load(name)
    implementations = backend.implementations()
    if op not in implementations:
        return _reference(op, f"{name} has no {op} of its own: it is made of library calls")
    refusal = backend.refuses(op, dtypes)
    if refusal is not None:
        return _reference(op, f"{name} does not compute it: {refusal}")
    return Choice(op, name, implementations[op], reason)


def _reference(op: str, reason: str) -> Choice:
    return Choice(op, "reference", OPS[op].reference, reason)


class Dispatcher:
    """Calls ops by name on one backend and device: check, choose (once for each op and dtypes), compute.

    Raises BackendError at construction if the backend or device cannot be used, ArgumentError from a call
    whose arguments do not fit together. `choices` tells what computed each op; each first choice is logged.
    """

    def __init__(self, backend: str = "auto", device: torch.device | str = "cpu") -> None:
        self.backend = backend
        self.device = torch.device(device)
        self.choices: dict[str, Choice] = {}
        self._by_dtypes: dict[tuple[str, frozenset[torch.dtype]], Choice] = {}
        check_backend(backend, self.device)

    def __call__(self, op: str, /, *args: Any, **kwargs: Any) -> Any:
        if op not in OPS:
            raise BackendError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
        OPS[op].check(*args, **kwargs)
        key = (op, frozenset(_dtypes((*args, *kwargs.values()))))
        choice = self._by_dtypes.get(key)
        if choice is None:
            choice = choose(op, self.device, key[1], self.backend)
            self._by_dtypes[key] = choice
            if choice not in self.choices.values():
                text = f"{op}: backend {choice.backend} ({choice.reason})"
                event("backend_chosen", text, op=op, backend=choice.backend, reason=choice.reason)
            self.choices[op] = choice
        return choice.function(*args, **kwargs)


def _dtypes(values: Iterable[Any]) -> Iterable[torch.dtype]:
    for value in values:
        if isinstance(value, Tensor):
            yield value.dtype
        elif isinstance(value, torch.dtype):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _dtypes(value)


def describe() -> list[tuple[str, bool, str]]:
    """(backend, works here, ops or the reason why not), for `pymerge env`."""
    rows = []
    for name in BACKENDS:
        backend = load(name)
        device = torch.device("cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu")
        reason = backend.unavailable(device)
        rows.append((name, reason is None, reason or ", ".join(backend.implementations())))
    return rows
