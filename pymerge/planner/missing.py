"""Tensors that an expert lacks: when the base's may stand in their place, and what to say when not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pymerge.architecture.roles import Kind, Role
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.common.names import listed
from pymerge.config.merge_config import MergeConfig


def refusal(
    expert: Checkpoint,
    missing: Sequence[str],
    donor: Checkpoint,
    roles: Mapping[str, Role],
    config: MergeConfig,
    *,
    stand_in: bool,
) -> str:
    """Problem of an expert that lacks some of the tensors that the donor has; "" if the base's stand in.

    Args:
        stand_in: whether there are others to stand in: not for the base itself, nor for a model that has none at all.
    """
    lacks = f"{expert.path} lacks {listed(missing)}"
    if any(".experts." in name for name in missing) and (uncut := _dequantised_stacks(expert)):
        return (  # taking the base's would leave out what the model has
            f"{lacks}: it has {listed(uncut)}, stacks that are dequantised when they are read, and these are not cut "
            "into single experts; save the model dequantised first, or make it the base"
        )
    if not stand_in or config.missing_tensors == "error":
        remedy = f"list models that are fine-tuned from {donor.path}"
        if stand_in:
            remedy += ", or set missing_tensors: base to take the base's in their place"
        return f"{lacks}{_alike(donor, expert, missing)}; {remedy}"
    rows = [name for name in missing if roles[name].kind in (Kind.EMBEDDING, Kind.HEAD)]
    if rows and config.tokenizer is not None:
        return (
            f"{expert.path} lacks {listed(rows)}: rows are matched token by token, and those of another model are in "
            "its order; give it these tensors, or merge without tokenizer_source"
        )
    return ""


def _dequantised_stacks(expert: Checkpoint) -> list[str]:
    return [
        name
        for name, entry in expert.tensors.items()
        if entry.decoded_from and len(entry.shape) == 3 and ".experts." in name
    ]


def _alike(donor: Checkpoint, expert: Checkpoint, missing: Sequence[str]) -> str:
    """A hint at tensors of the expert that could be one of those that it lacks, or ""."""
    from pymerge.architecture.renaming import nearest

    ours, theirs = ({name: entry.shape for name, entry in checkpoint.tensors.items()} for checkpoint in (donor, expert))
    return nearest(ours, theirs, missing)
