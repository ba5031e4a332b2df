"""FusionBench: any method of pymerge as an algorithm, `fusion_bench method=pymerge/<method>`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pymerge.common.libraries import require

if TYPE_CHECKING:
    from pymerge.integrations.fusion_bench.merge import Merge

__all__ = ["Merge"]


def __getattr__(name: str) -> Any:
    """Import FusionBench with the algorithm. Raises ArgumentError where it is missing or too old."""
    if name != "Merge":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require("fusion-bench")
    from pymerge.integrations.fusion_bench.merge import Merge

    return Merge
