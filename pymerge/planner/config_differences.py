"""Models whose configs, tokens or chat templates disagree: what people should know, and what cannot be merged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymerge.architecture.config_facts import TEXT_PARTS, TOKEN_ID, Fact, facts, normal
from pymerge.architecture.configs import Difference, differences
from pymerge.architecture.roles import Kind, Role
from pymerge.architecture.token_tables import has_tokens
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.config.merge_config import MergeConfig
from pymerge.errors import PlanError
from pymerge.planner.match import Section
from pymerge.planner.tokens import Aligned
from pymerge.tokenizers.compare import mismatch
from pymerge.tokenizers.files import CONFIG_FILE, is_tokenizer_file
from pymerge.tokenizers.planned import TokenPlan
from pymerge.tokenizers.templates import TEMPLATE_FILE, own_template

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_FILES = (_CONFIG, _GENERATION, CONFIG_FILE)
_SHOWN = 80  # characters of a value
_TOKENS = ("bos_token", "eos_token")  # of tokenizer_config.json


@dataclass(frozen=True)
class _Other:
    """A model beside the donor, and the tensors of the output that it takes part in."""

    checkpoint: Checkpoint
    names: frozenset[str]
    tables: bool  # tables of tokens are among them


def check_configs(
    aligned: Aligned, roles: Mapping[str, Role], config: MergeConfig, config_json: bytes | None
) -> list[str]:
    """Warnings about models that disagree with the donor on what weights mean, one for each key, with all values.

    Compared are config.json, the tokens of generation_config.json, tokenizers and chat templates, as far as config and
    files say: see docs/inputs.md. What a model takes no part in does not count, nor the files of a model that is still
    to be written.

    Args:
        config_json: of the output.

    Raises:
        PlanError: heads are cut differently, or activations differ.
    """
    donor, tokens = aligned.inputs.donor, aligned.tokens
    others = list(_others(aligned.inputs.all[1:], aligned.sections, roles))
    whole = not (config.slices or config.modules)
    found: dict[tuple[str, str, str], list[tuple[Difference, Path]]] = {}

    def add(file: str, folder: Path, every: Iterable[Difference]) -> None:
        for each in every:
            found.setdefault((file, each.meaning, each.ours.key), []).append((each, _place(folder, file)))

    for other in others:
        theirs, folder = other.checkpoint, other.checkpoint.path
        if donor.config and theirs.config:
            told = differences(donor.config, theirs.config, per_layer=not config.slices)
            add(_CONFIG, folder, (each for each in told if whole or _concerns(each.meaning, other)))
        if donor.stamps and theirs.stamps and (whole or other.tables):
            add(_GENERATION, folder, _tokens(*(_read(each, _GENERATION) for each in (donor, theirs))))
            if config.tokenizer is None:
                add(CONFIG_FILE, folder, _named_tokens(*(_read(each, CONFIG_FILE) for each in (donor, theirs))))
    found = dict(sorted(found.items(), key=lambda item: _FILES.index(item[0][0])))  # those of one file together
    output = {_CONFIG: json.loads(config_json or b"{}"), _GENERATION: _output_file(donor, tokens, _GENERATION)}
    problems = [_said(donor, file, each, None) for (file, _, _), each in found.items() if each[0][0].breaks]
    if problems:
        lesser = [each for each in found.values() if not each[0][0].breaks]
        raise PlanError([*problems, *([f"{donor.path}: {_listed(lesser)}"] if lesser else [])])
    warnings = [_said(donor, file, each, output.get(file)) for (file, _, _), each in found.items()]
    there = [other.checkpoint for other in others if other.checkpoint.stamps and (whole or other.tables)]
    if donor.stamps and config.tokenizer is None:
        warnings += _vocabularies(donor, there)
    if donor.stamps and config.chat_template is None:
        warnings += _templates(donor, there, tokens)
    return warnings


def _others(
    models: Iterable[Checkpoint], sections: Mapping[str, Section], roles: Mapping[str, Role]
) -> Iterator[_Other]:
    """The models beside the donor that take part in something."""
    parts: dict[Path, set[str]] = {}
    for name, section in sections.items():
        for expert in section.experts:
            parts.setdefault(expert.path, set()).add(name)
    for model in models:
        if names := parts.get(model.path):
            tables = any(roles[name].kind in (Kind.EMBEDDING, Kind.HEAD) and has_tokens(name) for name in names)
            yield _Other(model, frozenset(names), tables)


def _concerns(meaning: str, other: _Other) -> bool:
    """Whether a key is about tensors that a model takes part in: vision_config about those of the vision tower, what
    stands in no tower's config about all others."""
    towers = [key[:3] for key in other.checkpoint.config if key.endswith("_config") and key not in TEXT_PARTS]
    tower, dot, _ = meaning.partition("_config.")  # vision: vision_tower, visual; audio: audio_tower
    if dot:
        return any(tower[:3] in name for name in other.names)
    return any(not any(part in name for part in towers) for name in other.names)


def _said(donor: Checkpoint, file: str, found: list[tuple[Difference, Path]], output: Any) -> str:
    """The message on one key: values of the donor and of all others that differ; with the `output`'s, a warning."""
    first = found[0][0]
    values: dict[str, list[str]] = {}
    for each, path in found:
        key = "" if each.theirs.key == first.ours.key else f"{each.theirs.key} is "
        values.setdefault(f"{key}{_shown(each.theirs)}", []).append(str(path))
    theirs = " and ".join(f"{value} in {', '.join(paths)}" for value, paths in values.items())
    text = f"{_place(donor.path, file)}: {first.ours.key} is {_shown(first.ours)}, and {theirs}"
    if first.breaks:
        return f"{text}; no weights fit both: list models of one architecture, or correct the file that is wrong"
    now = facts(output).get(first.meaning) if output and file == _CONFIG else None
    if output and file == _GENERATION and first.ours.key in output:
        now = Fact(first.ours.key, output[first.ours.key], normal(first.ours.key, output[first.ours.key]))
    changed = now is not None and now.value != first.ours.value  # with the tokenizer of another model
    value = _shown(now if now is not None and changed else first.ours)
    if first.meaning.endswith("model_type"):
        return f"{text}; the output has {value}: see that both types compute the same with these weights"
    return f"{text}; the output has {value}: write another into its {file}, if the merged weights need it"


def _place(model: Path, file: str) -> Path:
    """Place where a model says something: a GGUF file has its config inside."""
    return model if model.suffix == ".gguf" else model / file


def _listed(found: Iterable[list[tuple[Difference, Path]]]) -> str:
    """Differences that alone would be warnings."""
    values = (
        f"{each[0][0].ours.key} ({_shown(each[0][0].ours)}; {', '.join(_shown(other.theirs) for other, _ in each)})"
        for each in found
    )
    return f"the models differ in these, too, which would be warnings: {', '.join(values)}"


def _shown(fact: Fact) -> str:
    text = json.dumps(fact.shown, ensure_ascii=False)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"{text} (by default)" if fact.default else text


def _tokens(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Difference]:
    """Tokens that two generation configs number differently."""
    for key in [key for key in ours if TOKEN_ID.search(key) and not key.startswith("forced") and key in theirs]:
        one, two = (Fact(key, each[key], normal(key, each[key])) for each in (ours, theirs))
        if one.value and two.value and one.value != two.value:
            yield Difference(key, one, two)


def _named_tokens(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Difference]:
    """Tokens that begin and end texts, where two tokenizers name others."""
    for key in _TOKENS:
        one, two = (each.get(key) for each in (ours, theirs))
        one, two = (each.get("content") if isinstance(each, dict) else each for each in (one, two))
        if isinstance(one, str) and isinstance(two, str) and one != two:
            yield Difference(key, Fact(key, one, one), Fact(key, two, two))


def _vocabularies(donor: Checkpoint, others: Iterable[Checkpoint]) -> Iterator[str]:
    ours = _tokenizer_files(donor)
    known: dict[Path, dict[str, int] | None] = {}
    for other in others:
        found = mismatch(donor.path, other.path, ours & _tokenizer_files(other), known)
        if found is None:
            continue
        text = f"{other.path / found.file}: not the vocabulary of {donor.path}"
        if found.moved:
            token, one, two = found.first
            places = (f"{'none' if number is None else number}" for number in (one, two))
            count = "1 token has" if found.moved == 1 else f"{found.moved} tokens have"
            text += f"; {count} another number ({token!r}: {' there, '.join(places)} here)"
        yield (
            f"{text}; rows of embeddings and heads are merged by number, and the output has the tokenizer of "
            f"{donor.path}: set tokenizer_source to match them by token"
        )


def _templates(donor: Checkpoint, others: Iterable[Checkpoint], tokens: TokenPlan) -> Iterator[str]:
    """A warning if the output has another chat template than models that have one, or none."""
    named = (TEMPLATE_FILE, CONFIG_FILE)
    output = {name: data for name in named if (data := _bytes(donor, name)) and name not in tokens.dropped}
    ours = _template(output | {name: tokens.files[name] for name in named if name in tokens.files})
    differing = []
    for other in others:
        files = {name: data for name in named if (data := _bytes(other, name))}
        theirs = _template(files)
        if theirs is not None and theirs != ours:
            differing.append(str(other.path / (TEMPLATE_FILE if TEMPLATE_FILE in files else CONFIG_FILE)))
    if differing and (ours is not None or _tokenizer_files(donor)):
        what = f"another chat template than the output, which has that of {donor.path}"
        if ours is None:
            what = f"a chat template, {donor.path} and the output have none"
        has = "has" if len(differing) == 1 else "have"
        remedy = "chat_template chooses one (auto: the most common of all models)"
        yield f"{', '.join(differing)}: {has} {what}; {remedy}"


def _template(files: Mapping[str, bytes]) -> str | None:
    try:
        found = own_template(files)
    except (ValueError, AttributeError):
        return None
    return found.strip() if found else None


def _tokenizer_files(model: Checkpoint) -> set[str]:
    return {name.as_posix() for name in model.other_files if is_tokenizer_file(name)}


def _output_file(donor: Checkpoint, tokens: TokenPlan, name: str) -> dict[str, Any]:
    return _parsed(tokens.files[name]) if name in tokens.files else _read(donor, name)


def _read(model: Checkpoint, name: str) -> dict[str, Any]:
    """A JSON object beside a model's weights; empty if there is none, which is not this module's concern."""
    return _parsed(_bytes(model, name))


def _bytes(model: Checkpoint, name: str) -> bytes:
    if Path(name) not in model.other_files:
        return b""
    try:
        return (model.path / name).read_bytes()
    except OSError:  # said when it is carried over
        return b""


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
