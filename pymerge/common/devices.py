"""Devices by name: known without PyTorch, which is asked only where there may be a GPU."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.errors import BackendError

if TYPE_CHECKING:
    import torch

# What PyTorch needs of the system to compute on a GPU: NVIDIA's driver, or AMD's (which it calls "cuda" too).
_NVIDIA, _AMD = "libcuda.so.1", Path("/dev/kfd")


@dataclass(frozen=True)
class Device:
    """A device as PyTorch names it: "cpu", "cuda", "cuda:1"."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


def resolve_device(device: str | torch.device, without: str = "use --device cpu") -> Device:
    """ "auto" is CUDA where there is one, else the CPU.

    Args:
        without: remedy for a machine without a CUDA device.

    Raises:
        BackendError: a device that cannot be used here.
    """
    name = str(device)
    if name == "auto":
        return Device("cuda" if _cuda_devices() else "cpu")
    found = re.fullmatch(r"([a-z]+)(?::([0-9]{1,4}))?", name)
    if found is None:
        raise BackendError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:N")
    resolved = Device(found[1], None if found[2] is None else int(found[2]))
    check_device(resolved, without)
    return resolved


def resolve_devices(names: str) -> list[str]:
    """The devices of a list such as "cuda:0,cuda:1", or of "all": every CUDA device. They are of one kind.

    Raises BackendError for devices that cannot be used here, or not together.
    """
    if names == "all":
        count = _cuda_devices()
        if not count:
            raise BackendError("devices all: PyTorch sees no CUDA device here; leave --devices out")
        return [f"cuda:{number}" for number in range(count)]
    found = [str(resolve_device(name.strip(), "leave --devices out")) for name in names.split(",")]
    if len({name.partition(":")[0] for name in found}) > 1:
        raise BackendError(f"devices {names}: the bytes of a merge are those of one kind of device; name one kind")
    return found


def check_device(device: Device | torch.device, without: str = "use --device cpu") -> None:
    """Raise BackendError, with the remedy `without` where there is no CUDA device, unless this one can be used here."""
    if device.type not in ("cpu", "cuda"):
        raise BackendError(f"device {str(device)!r} is not supported; choose cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= (count := _cuda_devices()):
        remedy = f"choose one of cuda:0 to cuda:{count - 1}, or cpu" if count else without
        raise BackendError(f"device {str(device)!r} was asked for and PyTorch sees {count}; {remedy}")


def _cuda_devices() -> int:
    """Number of CUDA devices that PyTorch sees; where no driver is installed, none, and it is not imported."""
    try:
        ctypes.CDLL(_NVIDIA)
    except OSError:
        if not _AMD.exists():
            return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
