"""How much memory there is, how much of it a merge may use, and giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pymerge.common.devices import Device
from pymerge.common.units import format_bytes

if TYPE_CHECKING:
    import torch

# What a merge takes of the memory that is available, unless --memory says otherwise.
HOST_SHARE = 0.75
# Of the free memory of a device: its allocator rounds sizes up and keeps freed blocks apart by stream.
DEVICE_SHARE = 0.8
# A merge that reads and writes more than this share of the available memory drops the files' pages behind itself.
CACHE_SHARE = 0.75

_UNLIMITED = 2**60  # cgroup v1 writes a number near 2^63 for "no limit"


@dataclass(frozen=True)
class Budget:
    """What a merge may use, in bytes.

    `tensors` bounds the tensors where they are computed on: `host` on a CPU, the device's share on CUDA.
    """

    device: str  # "cpu" or "cuda"
    host: int
    tensors: int
    available: int  # on the host when the plan was made
    origin: str  # of the limit on tensors, for people

    def keeps_cache(self, nbytes: int) -> bool:
        """Whether the pages of files of this size together may stay in the page cache."""
        return nbytes <= CACHE_SHARE * self.available


def budget(device: Device | torch.device, memory: int | None = None) -> Budget:
    """The budget of a merge on this device; `memory` is the limit on the host that the user has set."""
    available = available_bytes()
    host = int(HOST_SHARE * available) if memory is None else memory
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(str(device))
        origin = f"{DEVICE_SHARE:.0%} of {format_bytes(free)} free on {device}"
        return Budget(device.type, host, int(DEVICE_SHARE * free), available, origin)
    origin = "--memory" if memory is not None else f"{HOST_SHARE:.0%} of {format_bytes(available)} available"
    return Budget(device.type, host, host, available, origin)


def available_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process can still have: what the machine has available, or less where a cgroup limits it."""
    return min([psutil.virtual_memory().available, *_cgroup_rooms(proc, cgroups)])


def _cgroup_rooms(proc: Path, cgroups: Path) -> list[int]:
    """Limit less usage of each cgroup (v2 and v1) that this process is in. Pages of files don't count as used."""
    rooms = []
    for line in _text(proc / "self/cgroup").splitlines():
        number, controllers, name = line.split(":", 2)
        if number == "0" and not controllers:
            root, limit_name, usage_name, prefix = cgroups, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            limit_name, usage_name, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        # In a container the group is the root of what is mounted; elsewhere its ancestors have limits too.
        below = root / name.lstrip("/")
        for folder in [below, *below.parents]:
            if not folder.is_relative_to(root):
                break
            limit, usage = _text(folder / limit_name).strip(), _text(folder / usage_name).strip()
            if not limit.isdigit() or not usage.isdigit() or int(limit) >= _UNLIMITED:
                continue
            counts = dict(entry.split() for entry in _text(folder / "memory.stat").splitlines())
            cached = sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            rooms.append(max(0, int(limit) - int(usage) + cached))
    return rooms


def _text(path: Path) -> str:
    """The content of a file; "" if there is none (another kernel, another version of cgroups)."""
    try:
        return path.read_text()
    except OSError:
        return ""


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class Heap:
    """Gives freed memory back to the system.

    Left alone, glibc keeps freed blocks of up to 32 MiB for later use. Tensors are freed on other threads than those
    that allocate, in other sizes than the next ones, and the process would grow from layer to layer. So large blocks
    are mapped one by one, and what has gathered from smaller ones is returned now and then; both by measure of the
    limit on tensors. Other C libraries don't hold on, and have neither function.
    """

    _MMAP_THRESHOLD = -3  # mallopt's name for it

    def __init__(self, limit: int) -> None:
        self._kept = 0
        self._most = min(max(limit // 16, 2**21), 2**25)
        library = ctypes.CDLL(None)
        self._trim = getattr(library, "malloc_trim", None)
        if hasattr(library, "mallopt"):
            library.mallopt(self._MMAP_THRESHOLD, min(max(limit // 64, 2**18), 2**23))

    def freed(self, count: int) -> None:
        """`count` bytes have been freed since the last call."""
        self._kept += count
        if self._kept >= self._most:
            self.trim()

    def trim(self) -> None:
        """Return what is free now."""
        self._kept = 0
        if self._trim is not None:
            self._trim(0)
