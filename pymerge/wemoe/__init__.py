"""WEMoE: merged models whose modules mix base and experts for each input (arXiv 2402.00433, 2410.21804)."""

from __future__ import annotations

from pymerge.wemoe.adapt import adapt
from pymerge.wemoe.build import BuildPlan, BuildReport, build, plan_build
from pymerge.wemoe.load import load, save
from pymerge.wemoe.model import RoutedModel
from pymerge.wemoe.spec import ModuleSpec, RouterSpec, Spec, StorageSpec, read_spec, write_spec
from pymerge.wemoe.upscale import upscale

__all__ = [
    "BuildPlan",
    "BuildReport",
    "ModuleSpec",
    "RoutedModel",
    "RouterSpec",
    "Spec",
    "StorageSpec",
    "adapt",
    "build",
    "load",
    "plan_build",
    "read_spec",
    "save",
    "upscale",
    "write_spec",
]
