"""One model as a source of layers: its layers by number, under the donor's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pymerge.architecture.roles import Role, classify
from pymerge.architecture.stacks import shared_tensors, stacks
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry


@dataclass(frozen=True)
class Source:
    """A checkpoint's layers (number -> what follows the number in the name -> entry), and what is in no layer."""

    checkpoint: Checkpoint
    roles: dict[int, dict[str, TensorEntry]] = field(default_factory=dict)
    loose: dict[str, TensorEntry] = field(default_factory=dict)

    def placed(self, blocks: str, bounds: tuple[int, int], first: int, *, loose: bool) -> Checkpoint:
        """The checkpoint with the layers from bounds[0] to before bounds[1] alone, numbered from `first` on, and with
        what is in no layer if `loose`."""
        tensors = {
            f"{blocks}.{first + step}{rest}": entry
            for step, number in enumerate(range(*bounds))
            for rest, entry in self.roles[number].items()
        }
        return replace(self.checkpoint, tensors=tensors | self.loose if loose else tensors)


def read_source(checkpoint: Checkpoint, donor: Checkpoint, blocks: str, others: Mapping[str, int]) -> Source | None:
    """The source's layers under `blocks`, a path of the donor; None if it has no such layers.

    A source may have its names with a prefix beyond the donor's, or without one of the donor's. Its layers under the
    paths `others` of the donor are left out.
    """
    roles = classified(checkpoint)
    prefix = _prefix(blocks, stacks(roles))
    if prefix is None:
        return None
    lost, added = prefix
    path = lost + blocks[len(added) :]
    shared = shared_tensors(roles)
    source = Source(checkpoint)
    for name, entry in checkpoint.tensors.items():
        role = roles[name]
        renamed = name
        if name not in donor.tensors and name.startswith(lost):
            renamed = added + name[len(lost) :]
        if role.index is not None and role.blocks == path and name not in shared:
            rest = name[len(f"{role.blocks}.{role.index}") :]
            source.roles.setdefault(role.index, {})[rest] = entry
        elif role.blocks == path or role.blocks not in others:
            source.loose[renamed] = entry
    return source


def classified(checkpoint: Checkpoint) -> dict[str, Role]:
    """Roles of a checkpoint's tensors, by its own names and config.json."""
    described = {name: (entry.dtype, entry.shape) for name, entry in checkpoint.tensors.items()}
    return classify(described, checkpoint.config)


def _prefix(blocks: str, own: Mapping[str, int]) -> tuple[str, str] | None:
    """Beginning of a model's names, and that of the donor's instead; None if no prefix does it."""
    if blocks in own:
        return "", ""
    for path in own:
        if path.endswith(f".{blocks}"):
            return path[: -len(blocks)], ""
        if blocks.endswith(f".{path}"):
            return "", blocks[: -len(path)]
    return None
