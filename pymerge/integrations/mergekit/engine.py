"""pymerge in place of mergekit's `run_merge`, for all that calls it: commands, multi, evolve, programs."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pymerge.common.libraries import require
from pymerge.integrations.mergekit.configs import document_of
from pymerge.integrations.mergekit.merges import merge_document
from pymerge.integrations.mergekit.options import Options

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


# What is replaced: mergekit's function that merges to the disk, and its class that plans merges in memory.
_RUN, _PLANNER = "run_merge", "MergePlanner"
_OURS = "pymerge.integrations.mergekit"


class _Engine:
    """mergekit's own function and class, while ours are in their places, and how ours take configs."""

    originals: Mapping[str, Any] | None = None
    lenient = False


def replace_engine(lenient: bool = False) -> list[str]:
    """Put `run_merge` of this module in the place of mergekit's, wherever that is known by its name, and for merges in
    memory our planner in the place of `MergePlanner`.

    Args:
        lenient: parameters that mergekit ignores, since the method has none of that name, are left out with a warning;
            otherwise they are errors.

    Returns:
        The modules in which one of them was replaced; none of them if they were already.

    Raises:
        ArgumentError: mergekit is missing or too old.
    """
    require("mergekit")
    import mergekit.merge
    import mergekit.plan

    from pymerge.integrations.mergekit.in_memory import InMemoryPlanner

    _Engine.lenient = InMemoryPlanner.lenient = lenient
    if _Engine.originals is not None:
        return []
    _Engine.originals = {_RUN: mergekit.merge.run_merge, _PLANNER: mergekit.plan.MergePlanner}
    return _exchange(_Engine.originals, {_RUN: run_merge, _PLANNER: InMemoryPlanner})


def restore_engine() -> list[str]:
    """Undo `replace_engine`, also in modules imported since; returns the modules in which mergekit's are back."""
    if _Engine.originals is None:
        return []
    from pymerge.integrations.mergekit.in_memory import InMemoryPlanner

    originals, _Engine.originals = _Engine.originals, None
    return _exchange({_RUN: run_merge, _PLANNER: InMemoryPlanner}, originals)


def _exchange(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Put the new objects in the places of the old ones, by their names, in every module but ours."""
    changed = set()
    for module, found in list(sys.modules.items()):
        space = {} if module.startswith(_OURS) else getattr(found, "__dict__", {})
        for name, each in old.items():
            if space.get(name) is each:
                space[name] = new[name]
                changed.add(module)
    return sorted(changed)


def run_merge(
    merge_config: MergeConfiguration, out_path: str, options: MergeOptions, config_source: str | None = None
) -> None:
    """Merge as mergekit's function of this name would, by pymerge; the arguments are the same.

    Raises:
        PymergeError: one of its subclasses; the output is then absent, or marked unfinished.
    """
    document = document_of(merge_config, config_source, lenient=_Engine.lenient)
    own = Options(**{field.name: getattr(options, field.name) for field in fields(Options)})
    report = merge_document(document, out_path, own, (config_source or merge_config.to_yaml()).encode())
    if not logging.getLogger().hasHandlers():  # otherwise they are in the log
        for warning in report.warnings:
            warnings.warn(warning, stacklevel=2)
