"""Models of a merge with their tokenizer files, and what these say before any vocabulary is put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.config.merge_config import MergeConfig, participants
from pymerge.errors import CheckpointError, PlanError
from pymerge.methods.base import Method
from pymerge.planner.inputs import Inputs
from pymerge.tokenizers.files import FAST_FILE, VOCABULARY_FILES, Files, Vocabulary, read_files, read_vocabularies
from pymerge.tokenizers.settings import TokenizerSettings
from pymerge.tokenizers.templates import choose_template


@dataclass(frozen=True)
class NamedModel:
    """A model of the merge: its name in the config, where that stands, and its tokenizer files."""

    name: str
    place: str
    checkpoint: Checkpoint
    files: Files


def named_models(inputs: Inputs, config: MergeConfig, method: Method) -> list[NamedModel]:
    """The donor, then the experts, each folder once."""
    chosen = participants(config, method)
    places: list[tuple[str | int, ...]] = [("models", number, "model") for number in chosen]
    names = [config.models[number].model for number in chosen]
    places.insert(0, ("base_model",) if config.base_model else places[0])
    names.insert(0, config.base_model or names[0])
    found: dict[Path, NamedModel] = {}
    for name, place, checkpoint in zip(names, places, (inputs.donor, *inputs.experts), strict=True):
        if checkpoint.path not in found:
            files = _tokenizer_of(checkpoint)
            found[checkpoint.path] = NamedModel(name, config.place(*place), checkpoint, files)
    return list(found.values())


def _tokenizer_of(checkpoint: Checkpoint) -> Files:
    """The tokenizer files of a model; those of its base for an adapter that comes without."""
    names = checkpoint.other_files
    if checkpoint.base is not None and not any(name.name in (FAST_FILE, *VOCABULARY_FILES) for name in names):
        return _tokenizer_of(checkpoint.base)
    folder = checkpoint.path if checkpoint.base is None else checkpoint.files[0].parent
    return read_files(folder, names)


def assembled_models(inputs: Inputs, config: MergeConfig) -> list[NamedModel]:
    """The donor of an output that is put together from slices or modules, then the other models."""
    found = []
    for checkpoint in inputs.all:
        files = _tokenizer_of(checkpoint)
        found.append(NamedModel(str(checkpoint.path), config.name, checkpoint, files))
    return found


def check_one_vocabulary(models: Sequence[NamedModel], settings: TokenizerSettings, config: MergeConfig) -> None:
    """Raise PlanError unless all models have one vocabulary: rows of slices and modules are not gathered."""
    place = config.place(settings.key)
    if settings.tokens or settings.pad_to_multiple_of is not None:
        raise PlanError(
            [f"{place}: tokens and pad_to_multiple_of work with models, not with slices or modules; delete them"]
        )
    read = read_vocabularies({model.checkpoint.path: model.files for model in models})
    first = read[models[0].checkpoint.path]
    for path, vocabulary in read.items():
        if isinstance(vocabulary, CheckpointError):
            raise PlanError([f"{place}: {vocabulary}, or delete {settings.key}"]) from vocabulary
        if isinstance(first, Vocabulary) and vocabulary.ids != first.ids:
            raise PlanError(
                [
                    f"{place}: slices and modules need models of one vocabulary, and that of {path} is another "
                    f"than that of {first.folder}; give the models one vocabulary first, in merges of their own"
                ]
            )


def template_of(config: MergeConfig, models: Sequence[NamedModel], warnings: list[str]) -> str | None:
    """The output's chat template; None to leave that of the tokenizer."""
    if config.chat_template is None:
        return None
    if not models[0].files:
        place = config.place("chat_template")
        raise PlanError([f"{place}: {models[0].checkpoint.path} has no tokenizer files; delete chat_template"])
    found = choose_template(config.chat_template, [model.files for model in models])
    if found is None:
        warnings.append("chat_template: auto: no model has a chat template, so the output has none")
    return found
