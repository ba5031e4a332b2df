"""Networks of merges by data: what runs, in which blocks, and which weights get their inputs there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.common.libraries import require
from pymerge.config.merge_config import MergeConfig
from pymerge.errors import CheckpointError, PlanError
from pymerge.grams.model import Opened, blocks_of, linears_of, open_model

INSTEAD = "merge it by regmean, with Grams of pymerge collect"


@dataclass(frozen=True)
class Network:
    """Network of the output, without weights: `blocks` has the linear layers of each block by its name, each with the
    name of its weight in the files."""

    opened: Opened
    blocks: Mapping[str, tuple[tuple[str, nn.Module], ...]]


def network_of(donor: Checkpoint) -> Network:
    """The network of transformers that a donor is of.

    Raises CheckpointError where there is none of this name, PlanError where it has no blocks to merge one by one.
    """
    if not (donor.path / "config.json").is_file():
        raise CheckpointError(f"{donor.path}: has no config.json; give the folder of a model of transformers")
    opened = open_model(donor.path, donor)
    if opened.own is None:
        raise PlanError(
            [f"{donor.path}: its weights are not those of the network one by one, so no block can run; {INSTEAD}"]
        )
    layers = linears_of(opened, opened.model, donor, ()).layers
    blocks = {
        block: tuple(
            (name, opened.model.get_submodule(path)) for path, name in layers.items() if path.startswith(f"{block}.")
        )
        for block in blocks_of(opened.model)
    }
    if not any(blocks.values()):
        raise PlanError([f"{donor.path}: its network has no list of blocks with linear layers; {INSTEAD}"])
    return Network(opened, blocks)


def seen_weights(donor: Checkpoint, config: MergeConfig) -> frozenset[str]:
    """Weights whose inputs the blocks of a donor's network have, for a plan.

    Raises:
        ArgumentError: transformers is not there, or too old.
        PlanError, CheckpointError: as `network_of`, or the config arranges models otherwise than they are.
    """
    require("collect")
    if config.slices or config.modules or donor.modules or not donor.stamps:
        why = "runs the network of the base as it is; give models alone, without slices and modules"
        raise PlanError([f"{config.name}: {config.merge_method} {why}"])
    blocks = network_of(donor).blocks.values()
    found = [name for layers in blocks for name, _ in layers]
    shared = {name for name in found if found.count(name) > 1}
    return frozenset(found) - shared
