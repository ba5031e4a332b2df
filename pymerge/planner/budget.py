"""Budget of a merge: how much memory there is, and how much of it tensors may take; pages to hold them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pymerge.common.devices import Device
from pymerge.common.units import format_bytes
from pymerge.errors import ArgumentError

if TYPE_CHECKING:
    import torch

# What a merge takes of the memory that is available, unless --memory says otherwise.
HOST_SHARE = 0.75
# Of the free memory of a device: its allocator rounds sizes up and keeps freed blocks apart by stream, and references
# work in larger blocks there than plans count.
DEVICE_SHARE = 0.8
# A merge that reads and writes more than this share of the available memory drops the files' pages behind itself.
CACHE_SHARE = 0.75

_UNLIMITED = 2**60  # cgroup v1 writes a number near 2^63 for "no limit"


@dataclass(frozen=True)
class Budget:
    """Bytes that a merge may use.

    `tensors` bounds the tensors where they are computed on: `host` on a CPU, the device's share on CUDA.
    """

    device: str  # "cpu" or "cuda"
    host: int
    tensors: int
    available: int  # on the host when the plan was made
    origin: str  # of the limit on tensors, for people
    device_limit: int | None = None  # what the allocator of the device may take at most; None: what is free

    def keeps_cache(self, nbytes: int) -> bool:
        """Whether the pages of files of this size together may stay in the page cache."""
        return nbytes <= CACHE_SHARE * self.available


def budget(device: Device | torch.device, memory: int | None = None, device_memory: int | None = None) -> Budget:
    """The budget of a merge on this device; `memory` and `device_memory` are limits that the user has set: on the host
    and on the device. Raises ArgumentError where there is no such device, or not as much of it."""
    available = available_bytes()
    host = int(HOST_SHARE * available) if memory is None else memory
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(str(device))
        if device_memory is None:
            origin = f"{DEVICE_SHARE:.0%} of {format_bytes(free)} free on {device}"
            return Budget(device.type, host, int(DEVICE_SHARE * free), available, origin)
        if device_memory > free:
            raise ArgumentError(
                f"--device-memory {format_bytes(device_memory)} is more than the {format_bytes(free)} that are free on "
                f"{device}; give less, or end other programs that use it"
            )
        origin = f"{DEVICE_SHARE:.0%} of --device-memory {format_bytes(device_memory)}"
        return Budget(device.type, host, int(DEVICE_SHARE * device_memory), available, origin, device_memory)
    if device_memory is not None:
        raise ArgumentError(
            "--device-memory limits the memory of a GPU, and this merge is computed on the CPU; leave it out, --memory "
            "limits all of it"
        )
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
