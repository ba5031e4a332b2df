"""The checkpoints of a merge, opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pymerge.adapters.folder import AdapterFiles, is_adapter, open_adapter
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from pymerge.checkpoint.hub import fetch
from pymerge.config.merge_config import MergeConfig, participants
from pymerge.config.references import file_ids, hub_reference, model_path, split_adapter
from pymerge.errors import CheckpointError, PlanError
from pymerge.methods.base import Method


@dataclass(frozen=True)
class Inputs:
    """The open checkpoints. `donor` gives names, shapes, config.json and all other files of the output."""

    donor: Checkpoint
    experts: tuple[Checkpoint, ...]
    grams: Mapping[Path, tuple[int, int]] = field(default_factory=dict)  # files of statistics, with their stamps

    @property
    def all(self) -> tuple[Checkpoint, ...]:
        """Donor, experts, and the models that adapters among them are for, each folder once."""
        found = {checkpoint.path: checkpoint for checkpoint in (self.donor, *self.experts)}
        for expert in self.experts:
            if expert.base is not None:
                found.setdefault(expert.base.path, expert.base)
        return tuple(found.values())

    @property
    def carried(self) -> dict[Path, str]:
        """Sizes and times of the donor's files beside its weights: they decide layers and go into the output.

        Raises CheckpointError when a file has vanished since it was listed.
        """
        found = {}
        for name in (Path(self.donor.folder, "config.json"), *self.donor.other_files):
            path = self.donor.path / name
            try:
                status = path.stat()
            except (FileNotFoundError, NotADirectoryError):
                if name in self.donor.other_files:
                    raise CheckpointError(f"{path}: has vanished; put it back or plan again") from None
                continue
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its rights") from error
            found[path] = f"{status.st_size} bytes, {status.st_mtime_ns} ns"
        return found

    @property
    def stamps(self) -> dict[Path, tuple[int, int]]:
        """(size, mtime_ns) of every file of weights or statistics, as seen when the headers were read."""
        models = {path: stamp for checkpoint in self.all for path, stamp in checkpoint.all_stamps.items()}
        return models | dict(self.grams)

    def stored(self, entry: TensorEntry) -> tuple[TensorEntry, tuple[int, int]] | None:
        """A tensor in a file that is there, with size and time of the file: an entry itself, or, of a model that is
        still to be written, what it will be a copy of; None for what is to be merged, or made when it is read."""
        if entry.decoded_from or entry.adapter_parts:
            return None
        for checkpoint in (each for model in self.all for each in (model, *model.modules.values())):
            if stamp := checkpoint.stamps.get(entry.file):
                return entry, stamp
            if found := checkpoint.copied.get((entry.file, entry.name)):
                return found
        return None


def open_inputs(config: MergeConfig, method: Method, planned: Mapping[str, Checkpoint] | None = None) -> Inputs:
    """Open the base and all models that take part; those that are `planned` will be written before the merge runs.

    Raises:
        PlanError: some cannot be opened (all of them are named), no base for a method that needs one, or no expert.
    """
    if method.needs_base and config.base_model is None:
        raise PlanError([f"merge method {method.name!r} works on differences to a base; set base_model"])
    chosen = participants(config, method)
    if not chosen:
        raise PlanError([f"only the base is listed under models; list the experts that {method.name!r} shall merge"])
    names = [config.models[index].model for index in chosen]
    opened = open_models(config, [config.base_model or names[0], *names], planned)
    return Inputs(donor_of(config, opened), tuple(opened[name] for name in names))


def donor_of(config: MergeConfig, opened: Mapping[str, Checkpoint]) -> Checkpoint:
    """The donor among opened models: an adapter's model for the adapter. Raises PlanError for an adapter as base."""
    found = opened[config.donor]
    if found.base is None:
        return found
    if config.named_base is not None:
        raise PlanError(
            [
                f"{config.name}: base_model {config.named_base!r} is an adapter; name the model that it is for as "
                "base_model, and the adapter under models"
            ]
        )
    return found.base


def open_models(
    config: MergeConfig, names: Iterable[str], planned: Mapping[str, Checkpoint] | None = None
) -> dict[str, Checkpoint]:
    """Open the models of these names. Raises PlanError, which names all that cannot be opened."""
    problems: list[str] = []
    names = list(dict.fromkeys(names))
    pairs = {name: split_adapter(name, config.directory) or (name, "") for name in names}
    pieces = list(dict.fromkeys(piece for pair in pairs.values() for piece in pair if piece))
    opened: dict[str, Checkpoint | AdapterFiles] = {
        name: checkpoint for name, checkpoint in (planned or {}).items() if name in pieces
    }
    remote = [name for name in pieces if name not in opened and hub_reference(name, config.directory)]
    local = [name for name in pieces if name not in opened and name not in remote]
    for group in (local, remote):  # nothing is downloaded for a merge in which a model on this machine is wrong
        for name in group:
            try:
                opened[name] = _open(config, name)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise PlanError(problems)
    models = {name: each for name, each in opened.items() if isinstance(each, Checkpoint)}
    _refuse_twice(config, models)
    if len(models) == len(opened) and not any(adapter for _, adapter in pairs.values()):
        return {name: models[model] for name, (model, _) in pairs.items()}
    from pymerge.planner.applied import Applied

    return Applied(config, opened).all(pairs)


def _refuse_twice(config: MergeConfig, opened: Mapping[str, Checkpoint]) -> None:
    """Raise PlanError where two names turn out to be one model: of the Hub, downloaded only now."""
    known: dict[frozenset[tuple[int, int]], str] = {}
    for name, checkpoint in opened.items():
        found = file_ids(checkpoint.all_files)
        if found and known.setdefault(found, name) != name:
            raise PlanError(
                [
                    f"{config.name}: {name!r} and {known[found]!r} are one model ({checkpoint.path}); "
                    "run the same command again, or write one of the names in both places"
                ]
            )


def _open(config: MergeConfig, name: str) -> Checkpoint | AdapterFiles:
    reference = hub_reference(name, config.directory)
    if reference is None:
        path = model_path(name, config.directory, config.name)
        return open_adapter(path) if is_adapter(path) else open_checkpoint(path)
    folder = fetch(*reference)
    origin = f"{reference[0]}@{folder.name}"
    if is_adapter(folder):
        return replace(open_adapter(folder), origin=origin)
    return replace(open_checkpoint(folder), origin=origin)
