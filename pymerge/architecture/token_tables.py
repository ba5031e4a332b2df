"""Vocabularies of different sizes: which tensors have a row for each token, and which rows of them are merged."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pymerge.architecture.roles import Kind, Role
from pymerge.architecture.words import is_head_name
from pymerge.checkpoint.checkpoint import TensorEntry

_LANGUAGE_HEADS = {"lm_head", "embed_out"}
# Tables with a row for something else than a token.
_OTHER_TABLES = ("position", "pos_emb", "wpe", "token_type", "segment", "relative")


@dataclass(frozen=True)
class TableRows:
    """Rows of a tensor from row `start` on: the entries of these rows; without experts they are the base's alone."""

    start: int
    base: TensorEntry
    experts: tuple[TensorEntry, ...]


def is_token_table(
    name: str, roles: Mapping[str, Role], base: Mapping[str, TensorEntry], theirs: Mapping[str, TensorEntry]
) -> bool:
    """Whether a tensor of the base, of another length in an expert, has a row for each token on both sides.

    Embeddings have, but those of positions and segments, and heads of language models, which may be padded. Another
    head, or its bias, has if it is as long as such an embedding on both sides: classifiers have rows for labels.
    """
    ours, other, kind = base[name].shape, theirs[name].shape, roles[name].kind
    if not ours or not other or ours[1:] != other[1:]:
        return False
    if kind is Kind.EMBEDDING:
        return has_tokens(name)
    if kind is not Kind.HEAD and not (kind is Kind.BIAS and is_head_name(name)):
        return False
    if _is_language_head(name):
        return True
    tables = [table for table in roles if roles[table].kind is Kind.EMBEDDING and has_tokens(table)]
    lengths = [(base[table].shape[0], theirs[table].shape[0]) for table in tables if table in theirs]
    return (ours[0], other[0]) in lengths


def token_tables(
    tensors: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    roles: Mapping[str, Role],
    names: Iterable[str],
    tokens: int,
) -> list[str]:
    """Names of tensors that have a row for each of a model's `tokens`: embeddings, heads and biases of heads.

    An embedding has, if it is as long as config.json's vocab_size, or, where none is, at least as long as the
    tokenizer. Several embeddings of different lengths leave it open: then there are none. Heads of language models
    have, whatever their length; others if they are as long as the embedding.
    """
    nested = config.get("text_config")
    sizes = {part.get("vocab_size") for part in (config, nested) if isinstance(part, Mapping)}
    shapes = {name: tensors[name].shape for name in names if tensors[name].shape}
    lengths = {
        shape[0]
        for name, shape in shapes.items()
        if roles[name].kind is Kind.EMBEDDING and has_tokens(name) and len(shape) == 2
    }
    lengths = lengths & sizes or {length for length in lengths if length >= tokens}
    if len(lengths) != 1:
        return []

    def has(name: str) -> bool:
        kind, fits = roles[name].kind, shapes[name][0] in lengths
        if kind is Kind.EMBEDDING:
            return fits and has_tokens(name)
        if kind is not Kind.HEAD and not (kind is Kind.BIAS and is_head_name(name)):
            return False
        return fits or _is_language_head(name)

    return [name for name in shapes if has(name)]


def _is_language_head(name: str) -> bool:
    return not _LANGUAGE_HEADS.isdisjoint(name.split(".")[-2:-1])


def has_tokens(embedding: str) -> bool:
    """Whether the rows of an embedding are tokens, by its name: not positions, segments or distances."""
    return not any(word in embedding for word in _OTHER_TABLES)


def rows_of(base: TensorEntry, experts: Sequence[TensorEntry]) -> list[TableRows]:
    """The rows that all have, and then those beyond, which are the base's; usually all rows at once."""
    if all(expert.shape == base.shape for expert in experts):
        return [TableRows(0, base, tuple(experts))]
    common = min(entry.shape[0] for entry in (base, *experts))
    both = TableRows(0, base.rows(0, common), tuple(expert.rows(0, common) for expert in experts))
    if common == base.shape[0]:
        return [both]
    return [both, TableRows(common, base.rows(common, base.shape[0]), ())]
