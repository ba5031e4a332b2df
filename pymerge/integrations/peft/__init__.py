"""PEFT: adapters of a live model merged into another adapter of it, or into its weights, by any method."""

from __future__ import annotations

from pymerge.integrations.peft.added import MergedAdapter, add_merged_adapter
from pymerge.integrations.peft.into import merge_adapters_into

__all__ = ["MergedAdapter", "add_merged_adapter", "merge_adapters_into"]
