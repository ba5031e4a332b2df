"""pymerge merges fine-tuned models: WUDI-Merging, ACE-Merging, task arithmetic, averages; streaming, on CPU or CUDA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pymerge.env import hold_products

if TYPE_CHECKING:
    from pymerge import search, wemoe
    from pymerge.api import finalize, merge, multi, plan, run
    from pymerge.engine.in_memory import merge_state_dicts, merge_tensors
    from pymerge.engine.report import MergeReport
    from pymerge.errors import PymergeError
    from pymerge.extraction.api import extract, merge_adapters
    from pymerge.extraction.report import ExtractReport
    from pymerge.live.into import merge_into
    from pymerge.live.merger import Merger
    from pymerge.planner.plan import Plan

    __version__: str

__all__ = [
    "ExtractReport",
    "MergeReport",
    "Merger",
    "Plan",
    "PymergeError",
    "extract",
    "finalize",
    "merge",
    "merge_adapters",
    "merge_into",
    "merge_state_dicts",
    "merge_tensors",
    "multi",
    "plan",
    "run",
    "search",
    "wemoe",
]

hold_products()

_PACKAGES = ("search", "wemoe")

_HOMES = {
    "ExtractReport": "pymerge.extraction.report",
    "MergeReport": "pymerge.engine.report",
    "Merger": "pymerge.live.merger",
    "Plan": "pymerge.planner.plan",
    "PymergeError": "pymerge.errors",
    "extract": "pymerge.extraction.api",
    "finalize": "pymerge.api",
    "merge": "pymerge.api",
    "merge_adapters": "pymerge.extraction.api",
    "merge_into": "pymerge.live.into",
    "merge_state_dicts": "pymerge.engine.in_memory",
    "merge_tensors": "pymerge.engine.in_memory",
    "multi": "pymerge.api",
    "plan": "pymerge.api",
    "run": "pymerge.api",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `pymerge --help` does not wait for PyTorch."""
    if name == "__version__":
        from pymerge.env import version

        return version()
    if name not in (*_HOMES, *_PACKAGES):
        raise AttributeError(f"module 'pymerge' has no attribute {name!r}")
    from importlib import import_module

    if name in _PACKAGES:
        return import_module(f"pymerge.{name}")
    return getattr(import_module(_HOMES[name]), name)
