"""pymerge in place of mergekit's `run_merge`, for all that calls it: commands, multi, evolve, programs."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from pymerge.common.libraries import require
from pymerge.integrations.mergekit.configs import document_of
from pymerge.integrations.mergekit.merges import merge_document
from pymerge.integrations.mergekit.options import Options

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


class _Engine:
    """mergekit's own function, while ours is in its place, and how ours takes configs."""

    original: Callable[..., Any] | None = None
    lenient = False


def replace_engine(lenient: bool = False) -> list[str]:
    """Put `run_merge` of this module in the place of mergekit's, wherever that is known by its name.

    Args:
        lenient: parameters that mergekit ignores, since the method has none of that name, are left out with a warning;
            otherwise they are errors.

    Returns:
        The modules in which it was replaced; none of them if it was already.

    Raises:
        ArgumentError: mergekit is missing or too old.
    """
    require("mergekit")
    import mergekit.merge

    _Engine.lenient = lenient
    if _Engine.original is not None:
        return []
    _Engine.original = mergekit.merge.run_merge
    return _exchange(_Engine.original, run_merge)


def restore_engine() -> list[str]:
    """Undo `replace_engine`, also in modules imported since; returns the modules in which mergekit's is back."""
    if _Engine.original is None:
        return []
    original, _Engine.original = _Engine.original, None
    return _exchange(run_merge, original)


def _exchange(old: object, new: object) -> list[str]:
    """Put `new` in the place of `old` in every module that has it as run_merge, but for this one."""
    spaces = {name: getattr(module, "__dict__", {}) for name, module in list(sys.modules.items()) if name != __name__}
    names = sorted(name for name, space in spaces.items() if space.get("run_merge") is old)
    for name in names:
        spaces[name]["run_merge"] = new
    return names


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
