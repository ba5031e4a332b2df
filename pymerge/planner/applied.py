"""Adapters among the models of a config, on the models that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pymerge.adapters.apply import adapted
from pymerge.adapters.fitting import roles_of
from pymerge.adapters.folder import AdapterFiles
from pymerge.architecture.roles import Role
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.config.merge_config import MergeConfig
from pymerge.errors import CheckpointError, PlanError


class Applied:
    """Models as they are named, with adapters on their bases."""

    def __init__(self, config: MergeConfig, opened: Mapping[str, Checkpoint | AdapterFiles]) -> None:
        self._config = config
        self._opened = opened
        self._bases: dict[Path, set[Path]] = {}  # of each adapter
        self._roles: dict[Path, dict[str, Role]] = {}  # of each base's tensors
        self._names: dict[tuple[Path, Path], str] = {}  # of each adapter on a base, the first

    def all(self, pairs: Mapping[str, tuple[str, str]]) -> dict[str, Checkpoint]:
        """All models by their names, given as model and adapter. Raises PlanError, which names all that is wrong."""
        found: dict[str, Checkpoint] = {}
        problems: list[str] = []
        for name, (model, adapter) in pairs.items():
            try:
                found[name] = self._model(name, model, adapter)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise PlanError(dict.fromkeys(problems))
        return {name: self._told_apart(checkpoint) for name, checkpoint in found.items()}

    def _model(self, name: str, model: str, adapter: str) -> Checkpoint:
        opened = self._opened[model]
        if not adapter and isinstance(opened, Checkpoint):
            return opened
        files = self._opened[adapter] if adapter else opened
        if isinstance(files, Checkpoint):
            raise CheckpointError(
                f"{self._config.name}: {name!r}: {files.path} is a whole model and no adapter; list it for itself"
            )
        base = self._opened[model] if adapter else self._named_base(name, files)
        if not isinstance(base, Checkpoint):
            raise CheckpointError(
                f"{self._config.name}: {name!r}: {base.path} is an adapter; put its model before the +"
            )
        self._bases.setdefault(files.path, set()).add(base.path)
        if base.path not in self._roles:
            self._roles[base.path] = roles_of(base)
        found = adapted(base, files, roles=self._roles[base.path])
        first = self._names.setdefault((files.path, base.path), name)
        if first == name:
            return found
        return replace(found, notes=(*found.notes, f"{name!r} is the same adapter as {first!r}: it counts twice"))

    def _named_base(self, name: str, files: AdapterFiles) -> Checkpoint:
        """The base of an adapter that is named alone."""
        base, said = self._config.named_base, files.config.get("base_model_name_or_path")
        trained = f"; it was trained on {said}" if said else ""
        if base is None:
            raise CheckpointError(
                f"{self._config.name}: {name!r} is an adapter, and there is no base_model; add base_model, or write "
                f"BASE+{name}{trained}"
            )
        found = self._opened.get(base)
        if base == name or not isinstance(found, Checkpoint):
            raise CheckpointError(
                f"{self._config.name}: base_model {base!r} is an adapter; name the model that it is for as base_model, "
                f"and the adapter under models{trained}"
            )
        return found

    def _told_apart(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint; of an adapter that is applied to several bases with the base's path in its own."""
        if checkpoint.base is None or len(self._bases[checkpoint.path]) == 1:
            return checkpoint
        return replace(checkpoint, path=Path(f"{checkpoint.base.path}+{checkpoint.path}"))
