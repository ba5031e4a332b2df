"""Runs ops: which backend computes one (reference, native, triton or cuda), and why that one."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from pymerge.common.arrays import Array
from pymerge.common.devices import Device, check_device, resolve_device
from pymerge.common.events import event
from pymerge.errors import BackendError
from pymerge.ops import OPS
from pymerge.ops._op import Op, shape_of, torch_name
from pymerge.ops._precision import ieee_products

if TYPE_CHECKING:
    import torch

BACKENDS = ("reference", "native", "triton", "cuda")

Result = TypeVar("Result")

_NOT_MEASURED = (
    "PyTorch on the device: nobody has timed ours at such a shape on a {device}; --backend triton or cuda selects them"
)


class Backend(Protocol):
    """Interface of each package of this one, beside a module `<op>` with `compute(op, threads)` for each of its ops.

    A module that computes batches of layers at once says so by `TAKES_BATCHES = True`; one that knows other dtypes than
    the backend's ops have, by `DTYPES` of its own.
    """

    NAME: str
    DTYPES: frozenset[str]  # codes of the floating-point dtypes of inputs and results that its ops know

    def unavailable(self, device: Device) -> str | None:
        """Why the backend cannot compute on this device, with the remedy; None if it can."""


@dataclass(frozen=True)
class Choice:
    """The backend that computes an op, why it was chosen, and its function of the op and a number of threads."""

    op: str
    backend: str
    compute: Callable[[Op[Any], int], Any]
    reason: str


def load(name: str) -> Backend:
    """The package of a backend; BackendError if there is none of this name."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; choose auto, {', '.join(BACKENDS)}")
    return cast(Backend, import_module(f"pymerge.backends.{name}"))


@cache
def implemented(name: str) -> tuple[str, ...]:
    """The ops that a backend has code of its own for: the modules in its folder."""
    if name == "reference":
        return tuple(OPS)
    folder = import_module(f"pymerge.backends.{name}").__path__
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folder) if module.name in OPS))


def check_backend(name: str, device: Device) -> None:
    """Raise BackendError unless the named backend (or auto) and the device can be used here."""
    check_device(device)
    if name != "auto":
        reason = load(name).unavailable(device)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot be used: {reason}")


def choose(
    op: str, device: Device, dtypes: frozenset[str], wanted: str = "auto", shape: tuple[int, ...] = ()
) -> Choice:
    """Choose what computes an op.

    Args:
        op: a name of pymerge.ops.OPS.
        device: where the tensors are.
        dtypes: codes of the tensors' dtypes and of the result's, where one is asked for.
        wanted: a backend's name, or "auto": native on a CPU; on CUDA the fastest by pymerge.backends.measured, and
            PyTorch where nothing has been measured.
        shape: of the layer, d_out x d_in, or of a batch of layers.

    Raises BackendError if a backend is named that does not exist or cannot run here. An op or dtype that the named
    backend does not implement goes to the reference, and `reason` says so.
    """
    check_backend(wanted, device)
    if wanted != "auto":
        return _from(wanted, op, dtypes, "named")
    if device.type == "cuda":
        import torch

        return _measured(op, device, torch.cuda.get_device_name(str(device)), dtypes, shape)
    missing = load("native").unavailable(device)
    if missing is not None:
        return _from("reference", op, dtypes, f"the C++ backend cannot be used: {missing}")
    return _from("native", op, dtypes, "the C++ backend is the fastest on a CPU")


def _measured(op: str, device: Device, name: str, dtypes: frozenset[str], shape: tuple[int, ...]) -> Choice:
    from pymerge.backends import measured

    # A batch is computed by what computes its layers alone: how many are together depends on the memory that is free,
    # and must not change a bit.
    is_batch = OPS[op].takes_batches and len(shape) == 3
    row = measured.nearest(name, op, dtypes, shape[1:] if is_batch else shape)
    if row is None:
        return _reference(op, _NOT_MEASURED.format(device=name))
    missing = load(row.backend).unavailable(device)
    if missing is not None:
        return _reference(op, f"{row.backend} was measured as the fastest, and cannot be used: {missing}")
    return _from(row.backend, op, dtypes, f"{row.speedup:.2f} times PyTorch's speed, measured {row.source}")


def _from(name: str, op: str, dtypes: frozenset[str], reason: str) -> Choice:
    if name == "reference":
        return _reference(op, reason)
    if op not in implemented(name):
        return _reference(op, f"{name} has no {op} of its own: it is made of library calls")
    module = import_module(f"pymerge.backends.{name}.{op}")
    known: frozenset[str] = getattr(module, "DTYPES", load(name).DTYPES)
    if not dtypes <= known:
        unknown, all_known = (", ".join(sorted(map(torch_name, codes))) for codes in (dtypes - known, known))
        return _reference(op, f"{name} does not compute it: {unknown} is not one of {all_known}")
    batches = getattr(module, "TAKES_BATCHES", False)
    return Choice(op, name, module.compute if batches else _layer_by_layer(module.compute), reason)


def _layer_by_layer(compute: Callable[[Op[Any], int], Any]) -> Callable[[Op[Any], int], Any]:
    """A function that knows single layers, for batches too."""

    def computed(op: Op[Any], threads: int) -> Any:
        layers = op.layers()
        return compute(op, threads) if layers is None else op.stack([compute(layer, threads) for layer in layers])

    return computed


def _reference(op: str, reason: str) -> Choice:
    return Choice(op, "reference", lambda arguments, threads: arguments.reference(), reason)


class Runner:
    """Runs ops on one backend and device: check, choose (once for each op, dtypes and shape), compute.

    Native code works on arrays with one thread, so that several jobs may run side by side, and on tensors with as many
    as PyTorch has.

    Float32 is IEEE's, whatever the process has set.

    Raises BackendError at construction if the backend or device cannot be used, ArgumentError from a call whose
    arguments do not fit together. `choices` tells what computed each op last; each reason is logged once. Calls may
    come from several threads.
    """

    def __init__(self, backend: str = "auto", device: Device | torch.device | str = "cpu") -> None:
        self.backend = backend
        self.device = resolve_device(str(device))
        self.choices: dict[str, Choice] = {}
        self._by_call: dict[tuple[str, frozenset[str], tuple[int, ...]], Choice] = {}
        self._logged: set[tuple[str, str, str]] = set()
        check_backend(backend, self.device)

    def __call__(self, op: Op[Result], /) -> Result:
        op.check()
        like = op.like
        choice = self.choice(op.name, op.dtypes, shape_of(like))
        with ieee_products(self.device.type):
            result: Result = choice.compute(op, 1 if isinstance(like, Array) else _tensor_threads())
        return result

    def choice(self, op: str, dtypes: frozenset[str], shape: tuple[int, ...]) -> Choice:
        """The choice for an op, noted as used."""
        key = (op, dtypes, shape)
        choice = self._by_call.get(key)
        if choice is None:
            choice = self._by_call[key] = choose(op, self.device, dtypes, self.backend, shape)
            self._log(choice)
        self.choices[op] = choice
        return choice

    def _log(self, choice: Choice) -> None:
        said = (choice.op, choice.backend, choice.reason)
        if said not in self._logged:
            self._logged.add(said)
            text = f"{choice.op}: backend {choice.backend} ({choice.reason})"
            event("backend_chosen", text, op=choice.op, backend=choice.backend, reason=choice.reason)


def _tensor_threads() -> int:
    import torch

    return torch.get_num_threads()


def describe() -> list[tuple[str, bool, str]]:
    """(backend, works here, ops or the reason why not), for `pymerge env`."""
    import torch

    rows = []
    for name in BACKENDS:
        device = Device("cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu")
        reason = load(name).unavailable(device)
        rows.append((name, reason is None, reason or ", ".join(implemented(name))))
    return rows
