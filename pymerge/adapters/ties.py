"""Adapters of embeddings and heads that their base ties: PEFT unties what it adapts, and an output has both in one."""

from __future__ import annotations

from collections.abc import Mapping

from pymerge.adapters.folder import AdapterFiles
from pymerge.adapters.keys import Keys, Module
from pymerge.architecture.roles import Kind, Role
from pymerge.architecture.tied import tied_tensors, ties
from pymerge.architecture.token_tables import has_tokens
from pymerge.architecture.words import is_head_name
from pymerge.checkpoint.checkpoint import Checkpoint
from pymerge.checkpoint.compare import Relation, relation
from pymerge.checkpoint.reader import Reader
from pymerge.checkpoint.safetensors_file import TensorEntry
from pymerge.common.dtypes import ITEM_SIZES
from pymerge.errors import CheckpointError

# Ends of names of architectures with a table of tokens and no head of its size that could be tied to it.
_HEADLESS = ("Classification", "QuestionAnswering", "MultipleChoice", "NextSentencePrediction", "Model", "Encoder")
_HEADS = ("HeadModel", "HeadsModel")


def ties_head(base: Checkpoint, roles: Mapping[str, Role]) -> bool:
    """Whether a base makes its head of its table of tokens: by config.json, or, where that leaves it to the class,
    because a model that needs a head stores none, or the table twice. Classifiers and bare models have no such head."""
    architecture = str((base.config.get("architectures") or [""])[0])
    headless = architecture.endswith(_HEADLESS) and not architecture.endswith(_HEADS)
    if headless and not any("shared" in name.split(".") for name in roles):
        return False
    said = ties(base.config)
    if said is not None or not architecture:
        return bool(said)
    stored = [name for name, role in roles.items() if role.kind is Kind.HEAD and len(base.tensors[name].shape) == 2]
    return not stored or bool(tied_tensors(base, roles))


def drop_tied_heads(
    base: Checkpoint, roles: Mapping[str, Role], keys: Keys, files: AdapterFiles, keeps_tie: bool
) -> None:
    """Take factors and rows of a tied head out of `keys`, where the embedding has the same: the table has them once.

    Args:
        base: a model that ties its head.
        roles: of its tensors.
        keeps_tie: the adapter's ensure_weight_tying.

    Raises:
        CheckpointError: only one of the two is adapted, or each differently.
    """
    tables = [name for name in roles if roles[name].kind is Kind.EMBEDDING and has_tokens(name)]
    table = min(tables, key=lambda name: name.count("."), default=None)
    if table is None or len(base.tensors[table].shape) != 2:
        return
    shape, word = base.tensors[table].shape, table.rpartition(".")[0].rpartition(".")[2]
    factors = list(keys.modules.values())
    heads = [each for each in factors if not each.embedding and _is_head(each.name) and _size(each) == shape]
    embeddings = [each for each in factors if each.embedding and each.a.shape[1] == shape[0]]
    with Reader(files.stamps | base.stamps) as reader:
        values = [name for name in keys.values if name.rpartition(".")[0].rpartition(".")[2] == word]
        own = keys.values[values[0]] if values else base.tensors[table]
        saved = [name for name, entry in keys.values.items() if _is_saved_head(name, entry, own)]
        for name in saved or ([] if keeps_tie else values):
            other = own if saved else base.tensors[table]
            if relation(reader, keys.values[name], other) is not Relation.SAME:
                raise _untied(base, files, name)
        if heads and embeddings and _equal(reader, heads[0], embeddings[0]):
            del keys.modules[heads[0].name, heads[0].depth]
            keys.values.pop(f"{heads[0].name}.weight", None)  # the table once more, before the factors
        elif heads or (embeddings and not keeps_tie):
            raise _untied(base, files, (heads or embeddings)[0].name)
        for head in [module for module in keys.tokens if _is_head(module)]:
            rows = next((rows for name, rows in keys.tokens.items() if name.rpartition(".")[2] == word), None)
            if rows is None or relation(reader, keys.tokens[head], rows) is not Relation.SAME:
                raise _untied(base, files, head)
            del keys.tokens[head]
            keys.values.pop(f"{head}.weight", None)


def _untied(base: Checkpoint, files: AdapterFiles, name: str) -> CheckpointError:
    other = "embedding" if _is_head(name) or _is_head(name.rpartition(".")[0]) else "head"
    return CheckpointError(
        f"{files.file}: changes {name} alone, which {base.path} ties to its {other}, and PEFT unties them in training "
        "(its merge_and_unload ties them again); write the base with a head of its own (a copy of its table under the "
        "head's name, and tie_word_embeddings: false), and name that one"
    )


def _is_head(module: str) -> bool:
    return is_head_name(f"{module}.weight") or module.rpartition(".")[2] == "output"


def _is_saved_head(name: str, entry: TensorEntry, table: TensorEntry) -> bool:
    """Whether a whole tensor is the head that a table of its size would be tied to."""
    return _is_head(name.rpartition(".")[0]) and name.endswith(".weight") and entry.shape == table.shape


def _size(module: Module) -> tuple[int, ...]:
    return module.left.shape[0], module.right.shape[1]


def _equal(reader: Reader, head: Module, embedding: Module) -> bool:
    """Whether the factors of a head are those of an embedding, transposed."""
    return all(_transposed_values(reader, one, other) for one, other in ((head.a, embedding.b), (head.b, embedding.a)))


def _transposed_values(reader: Reader, one: TensorEntry, other: TensorEntry) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape[::-1]:
        return False
    import numpy as np

    kind = np.dtype(f"u{ITEM_SIZES[one.dtype]}")
    first, second = (np.frombuffer(reader.read_bytes(each), kind).reshape(each.shape) for each in (one, other))
    return bool(np.array_equal(first, second.T))
