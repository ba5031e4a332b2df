"""Merges by data as the Python interface asks for them; PyTorch and transformers are imported where one is made."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.config.merge_config import MergeConfig
from pymerge.output.directory import OutputDirectory
from pymerge.planner.plan import Plan


def seen_weights(donor: Checkpoint, config: MergeConfig) -> Collection[str]:
    """Weights whose inputs a donor's network shows, see `pymerge.grams.network.seen_weights`."""
    from pymerge.grams import network

    return network.seen_weights(donor, config)


def with_grams(*, shown: bool) -> Callable[[Plan, OutputDirectory], Plan]:
    """A function that runs models over data for a merge, see `pymerge.grams.sequence.with_grams_of_data`."""
    from pymerge.grams.sequence import with_grams_of_data

    return partial(with_grams_of_data, shown=shown)
