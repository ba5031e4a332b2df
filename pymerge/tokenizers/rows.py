"""Origins of the rows of the output's token tables: a model and a row of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pymerge.checkpoint.row_map import AVERAGE, MEAN, ZERO, RowMap
from pymerge.tokenizers.files import Vocabulary
from pymerge.tokenizers.settings import TokenRule

_SHOWN = 3


@dataclass(frozen=True)
class TokenModel:
    """A model whose rows are read: its name in the config, its vocabulary, the length of its token tables."""

    name: str
    vocabulary: Vocabulary
    rows: int

    @property
    def folder(self) -> Path:
        return self.vocabulary.folder


@dataclass(frozen=True)
class _Donors:
    """Donor of each row of the output: the table (or ZERO, AVERAGE) and row of a model that lacks the token."""

    source: NDArray[np.int64]
    row: NDArray[np.int64]
    forced: NDArray[np.bool_]
    averages: tuple[tuple[tuple[int, int], ...], ...]


def row_maps(
    output: Vocabulary,
    rows: int,
    models: Sequence[TokenModel],
    base: int | None,
    rules: Mapping[str, TokenRule],
    warnings: list[str],
    problems: list[tuple[str, str]],
) -> list[RowMap]:
    """One map for each model, in their order, which is also the numbers of their tables.

    mergekit's rules: a model's own row, where it has the token. Otherwise the source that `rules` name; else the base's
    row (`base` is the number of its model); else that of the only model that has the token; else the average of those
    that have it; zeros for a token that none has. `force` takes the source for all. Rows without a token are padding:
    as they are where all models have padding there, else the mean of the model's rows. Problems are pairs of a token
    of `rules` and a text.
    """
    own = np.full((len(models), rows), -1, np.int64)
    places = np.fromiter(output.ids.values(), np.int64)
    for number, model in enumerate(models):
        ids = model.vocabulary.ids
        found = places if ids is output.ids else np.fromiter((ids.get(token, -1) for token in output.ids), np.int64)
        own[number, places] = np.where(found < model.rows, found, -1)
    used = np.zeros(rows, np.bool_)
    used[places] = True
    donors = _donors(output, own, used, models, base, rules, warnings, problems)
    padding = _padding(rows, used, models)
    maps = []
    for number in range(len(models)):
        mine = (own[number] >= 0) & ~donors.forced
        source = np.where(mine, number, donors.source)
        source = np.where(used, source, np.where(padding, number, MEAN))
        row = np.where(mine, own[number], donors.row)
        row = np.where(used, row, np.where(padding, np.arange(rows), 0))
        maps.append(RowMap(source, row, donors.averages if (source == AVERAGE).any() else ()))
    return maps


def _padding(rows: int, used: NDArray[np.bool_], models: Sequence[TokenModel]) -> NDArray[np.bool_]:
    """Rows of the output without a token that are padding in all models."""
    found = ~used
    for model in models:
        taken = np.zeros(max(rows, model.vocabulary.limit), np.bool_)
        taken[list(model.vocabulary.ids.values())] = True
        found &= ~taken[:rows] & (np.arange(rows) < model.rows)
    return found


def _donors(
    output: Vocabulary,
    own: NDArray[np.int64],
    used: NDArray[np.bool_],
    models: Sequence[TokenModel],
    base: int | None,
    rules: Mapping[str, TokenRule],
    warnings: list[str],
    problems: list[tuple[str, str]],
) -> _Donors:
    has = own >= 0
    count = has.sum(axis=0)
    first = has.argmax(axis=0)
    if base is not None:
        first = np.where((count > 1) & has[base], base, first)
    source = np.where(count == 0, ZERO, first)
    shared = (count > 1) & (count < len(models)) & used
    if base is not None:
        shared &= ~has[base]
    row = np.where(count == 0, 0, np.take_along_axis(own, first[None], axis=0)[0])
    averages: list[tuple[tuple[int, int], ...]] = []
    for number in np.flatnonzero(shared):
        source[number], row[number] = AVERAGE, len(averages)
        averages.append(tuple((int(model), int(own[model, number])) for model in np.flatnonzero(has[:, number])))
    forced = np.zeros(len(used), np.bool_)
    for token, rule in rules.items():
        if rule.source is None or token not in output.ids:
            continue
        place = output.ids[token]
        forced[place] = rule.force
        if not rule.force and count[place] == len(models):
            continue
        found = _named_row(token, rule, models, problems)
        if found is not None:
            source[place], row[place] = found
            count[place] = max(count[place], 1)
    nowhere = [token for token, number in output.ids.items() if count[number] == 0]
    if nowhere:
        more = f" and {len(nowhere) - _SHOWN} more" if len(nowhere) > _SHOWN else ""
        names = ", ".join(map(repr, nowhere[:_SHOWN]))
        warnings.append(f"no model has a row for {names}{more}; zeros are used: name a source under tokenizer.tokens")
    return _Donors(source, row, forced, tuple(averages))


def _named_row(
    token: str, rule: TokenRule, models: Sequence[TokenModel], problems: list[tuple[str, str]]
) -> tuple[int, int] | None:
    """Table and row of a rule's source; None and a problem if the model has no such row."""
    source = rule.source
    if source is None or source.model is None:
        return ZERO, 0
    number = next(number for number, model in enumerate(models) if model.name == source.model)
    model = models[number]
    wanted = token if source.token is None else source.token
    row = model.vocabulary.ids.get(wanted, -1) if source.token_id is None else source.token_id
    if 0 <= row < model.rows:
        return number, row
    if source.token_id is not None:
        what = f"model {model.name} has {model.rows} rows, none with number {row}; write a smaller token_id"
    elif row < 0:
        what = f"model {model.name} has no token {wanted!r}; name a model that has it, or another token"
    else:
        what = f"token {wanted!r} of model {model.name} has number {row}, beyond its {model.rows} rows; name another"
    problems.append((token, what))
    return None
