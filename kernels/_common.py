"""Launch sizes by architecture: a table, since autotuning needs a driver and would differ between runs."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sizes(NamedTuple):
    """Sizes of one launch."""

    block: int  # elements (combine), or rows and columns of a tile (task_gram, routed_linear)
    depth: int  # rows of tau (task_gram), or inputs (routed_linear), that a tile reads at a time
    warps: int


# compute capability -> op -> sizes, not yet timed. A device takes the newest row not newer than itself.
_SIZES = {
    80: {"combine": Sizes(1024, 0, 4), "task_gram": Sizes(64, 32, 4), "routed_linear": Sizes(64, 32, 4)},
    90: {"combine": Sizes(1024, 0, 4), "task_gram": Sizes(64, 32, 4), "routed_linear": Sizes(64, 32, 4)},
}


def sizes(op: str, device: torch.device) -> Sizes:
    """Launch sizes of an op on a device; in the interpreter, those of the oldest architecture."""
    oldest = min(_SIZES)
    capability = oldest
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = max(10 * major + minor, oldest)
    return _SIZES[max(row for row in _SIZES if row <= capability)][op]
