"""The output's vocabulary in the plan: each model's token tables as gathered to it, and the files that hold it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymerge.architecture.roles import Role
from pymerge.architecture.token_tables import token_tables
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.checkpoint.gathered import gathered
from pymerge.checkpoint.model_files import plain_files
from pymerge.config.merge_config import MergeConfig
from pymerge.config.references import hub_reference, model_path
from pymerge.errors import CheckpointError, PlanError
from pymerge.methods.base import Method
from pymerge.planner.inputs import Inputs
from pymerge.planner.match import Matched, Section
from pymerge.planner.tokenizer_models import (
    NamedModel,
    assembled_models,
    check_one_vocabulary,
    named_models,
    template_of,
)
from pymerge.tokenizers.files import (
    Vocabulary,
    read_files,
    read_json,
    read_vocabularies,
    read_vocabulary,
)
from pymerge.tokenizers.output import tokenizer_files, union, with_tokens, without_rows_beyond
from pymerge.tokenizers.planned import TokenPlan, describe_rows, plan_files
from pymerge.tokenizers.settings import BASE, UNION, TokenizerSettings

if TYPE_CHECKING:
    from pymerge.checkpoint.row_map import RowMap
    from pymerge.tokenizers.rows import TokenModel

_GENERATION = "generation_config.json"
_ID_SUFFIX = "_token_id"


@dataclass(frozen=True)
class Aligned:
    """Inputs whose token tables all have the output's vocabulary, and the sections of the output that read them."""

    inputs: Inputs
    sections: Mapping[str, Section]
    tokens: TokenPlan


@dataclass(frozen=True)
class _Source:
    """Source of the output's tokenizer; `rows` is the length of its model's tables, 0 without a model."""

    vocabulary: Vocabulary
    rows: int


def align(matched: Matched, roles: Mapping[str, Role], config: MergeConfig, method: Method) -> Aligned:
    """Carry out the config's tokenizer keys on matched inputs; without any, the inputs are what they were.

    Args:
        matched: from `match_tensors`: the experts' tensors have the donor's names. Its warnings get what people
            should know.

    Raises:
        PlanError: a model has no usable tokenizer, a token has no row where the config says, tables do not fit.
        CheckpointError: a tokenizer file cannot be read.
    """
    settings = config.tokenizer
    inputs, names, warnings = matched.inputs, matched.names, matched.warnings
    if settings is None and config.chat_template is None:
        return Aligned(inputs, matched.sections, TokenPlan())
    assembled = bool(config.slices or config.modules)
    models = assembled_models(inputs, config) if assembled else named_models(inputs, config, method)
    template = template_of(config, models, warnings)
    carried = models[0].files
    if settings is not None and assembled:
        check_one_vocabulary(models, settings, config)
    if settings is None or assembled:
        return Aligned(inputs, matched.sections, plan_files(tokenizer_files(None, carried, template), carried))
    token_models, tables = _token_models(models, roles, names, settings, warnings)
    source = _source(config, settings, token_models)
    output = source.vocabulary
    if settings.source in (UNION, BASE):
        output = without_rows_beyond(output, source.rows)
    if settings.source == UNION:
        others = [model.vocabulary for model in token_models[1:]]
        output = union(output, others, {model.folder: model.rows for model in token_models}, warnings)
    output = with_tokens(output, list(settings.tokens))
    rows = max(output.limit, source.rows)
    if (multiple := settings.pad_to_multiple_of) is not None:
        rows = -(-output.limit // multiple) * multiple
    maps = _maps(config, settings, output, rows, token_models, warnings)
    written = tokenizer_files(None if output is source.vocabulary else output, source.vocabulary.files, template)
    keys: dict[str, Any] = {"vocab_size": rows}
    if source.vocabulary.folder != inputs.donor.path:
        keys |= _token_ids(source.vocabulary.folder / "config.json")
        if ids := _token_ids(source.vocabulary.folder / _GENERATION):
            written[_GENERATION] = _with_keys(inputs.donor.path / _GENERATION, ids)
    lines = [f"vocabulary  {settings.source}: {len(output.ids):,} tokens, {rows:,} rows in {', '.join(tables)}"]
    for number, (model, found) in enumerate(zip(token_models, maps, strict=True)):
        size = f"{len(model.vocabulary.ids):,} tokens, {model.rows:,} rows"
        lines.append(f"  {model.folder}: {size}; {describe_rows(found, number)}")
    tokens = plan_files(written, carried, keys, lines, maps)
    inputs = _gathered(inputs, models, tables, maps)
    sections = {name: replace(section, experts=inputs.experts) for name, section in matched.sections.items()}
    return Aligned(inputs, sections, tokens)


def _token_models(
    models: Sequence[NamedModel],
    roles: Mapping[str, Role],
    names: Sequence[str],
    settings: TokenizerSettings,
    warnings: list[str],
) -> tuple[list[TokenModel], list[str]]:
    """All models with vocabularies and lengths of tables, and the names of the tables."""
    from pymerge.tokenizers.rows import TokenModel

    problems: list[str] = []
    vocabularies: list[Vocabulary] = []
    read = read_vocabularies({model.checkpoint.path: model.files for model in models})
    for model in models:
        vocabulary = read[model.checkpoint.path]
        if isinstance(vocabulary, CheckpointError):
            problems.append(f"{model.place}: {vocabulary}, or delete {settings.key}")
        else:
            vocabularies.append(vocabulary)
    if problems:
        raise PlanError(problems)
    donor = models[0].checkpoint
    tables = token_tables(donor.tensors, donor.config, roles, names, len(vocabularies[0].ids))
    if not tables:
        raise PlanError(
            [
                f"{donor.path}: has no tensor that is known to have a row for each of its "
                f"{len(vocabularies[0].ids)} tokens; delete {settings.key}"
            ]
        )
    found = []
    for model, vocabulary in zip(models, vocabularies, strict=True):
        lengths = {name: model.checkpoint.tensors[name].shape[0] for name in tables}
        rows = min(lengths.values())
        if rows != max(lengths.values()):
            said = ", ".join(f"{name} {length}" for name, length in lengths.items())
            problems.append(
                f"{model.checkpoint.path}: has token tables of different lengths ({said}); give them one length "
                f"(transformers: resize_token_embeddings, then save_pretrained), or delete {settings.key}"
            )
        beyond = [token for token, number in vocabulary.ids.items() if number >= rows]
        if beyond:
            warnings.append(
                f"{model.checkpoint.path}: its tokenizer has {len(beyond)} tokens beyond the {rows} rows of its "
                f"embedding, {beyond[0]!r} among them; they count as missing there"
            )
        found.append(TokenModel(model.name, vocabulary, rows))
    if problems:
        raise PlanError(problems)
    return found, tables


def _source(config: MergeConfig, settings: TokenizerSettings, models: Sequence[TokenModel]) -> _Source:
    """The base, or the model that is named: one of the merge, or a folder with a tokenizer."""
    if settings.source in (UNION, BASE):
        return _Source(models[0].vocabulary, models[0].rows)
    place = config.place(*((settings.key,) if settings.key == "tokenizer_source" else ("tokenizer", "source")))
    try:
        named = next((model for model in models if model.name == settings.source), None)
        if named is None and hub_reference(settings.source, config.directory) is None:
            folder = model_path(settings.source, config.directory, config.name)
            named = next((model for model in models if model.folder == folder), None)
            if named is None:
                files = read_files(folder, plain_files(folder) if folder.is_dir() else ())
                return _Source(read_vocabulary(folder, files), 0)
    except CheckpointError as error:
        raise PlanError([f"{place}: {error}"]) from error
    if named is None:
        raise PlanError(
            [f"{place}: {settings.source!r} is no model of this merge; download its tokenizer, and give the folder"]
        )
    return _Source(named.vocabulary, named.rows)


def _maps(
    config: MergeConfig,
    settings: TokenizerSettings,
    output: Vocabulary,
    rows: int,
    models: Sequence[TokenModel],
    warnings: list[str],
) -> list[RowMap]:
    from pymerge.tokenizers.rows import row_maps

    wrong: list[tuple[str, str]] = []
    base = 0 if config.base_model else None
    maps = row_maps(output, rows, models, base, settings.tokens, warnings, wrong)
    if wrong:
        raise PlanError(
            f"{config.place('tokenizer', 'tokens', token)}: token {token!r}: {text}" for token, text in wrong
        )
    return maps


def _gathered(inputs: Inputs, models: Sequence[NamedModel], tables: Sequence[str], maps: Sequence[RowMap]) -> Inputs:
    """The inputs with the token tables as their maps say; a model whose rows stay where they are keeps its own."""
    sources = {name: tuple(model.checkpoint.tensors[name] for model in models) for name in tables}
    aligned: dict[Path, Checkpoint] = {}
    for number, (model, found) in enumerate(zip(models, maps, strict=True)):
        own: dict[str, TensorEntry] = {
            name: gathered(sources[name][number], found, sources[name])
            for name in tables
            if not (found.is_identity(number) and len(found) == sources[name][number].shape[0])
        }
        aligned[model.checkpoint.path] = replace(model.checkpoint, tensors=model.checkpoint.tensors | own)
    return Inputs(aligned[inputs.donor.path], tuple(aligned[expert.path] for expert in inputs.experts))


def _token_ids(path: Path) -> dict[str, Any]:
    """The keys of a config that name tokens by their ids; none if there is no such file."""
    content = read_json(path) if path.is_file() else {}
    return {key: value for key, value in content.items() if key.endswith(_ID_SUFFIX)}


def _with_keys(path: Path, keys: Mapping[str, Any]) -> bytes:
    content = {**(read_json(path) if path.is_file() else {}), **keys}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
