"""Output heads that are their model's token embedding: tied by config.json, or the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pymerge.architecture.roles import Kind, Role
from pymerge.architecture.token_tables import has_tokens
from pymerge.checkpoint.checkpoint import Checkpoint, TensorEntry
from pymerge.checkpoint.compare import same_bytes
from pymerge.checkpoint.reader import Reader

_TIED = "tie_word_embeddings"


def ties(config: Mapping[str, Any]) -> bool | None:
    """Whether config.json ties the head; None if it says nothing."""
    nested = config.get("text_config")
    parts = (config, nested if isinstance(nested, Mapping) else {})
    flags = [part[_TIED] for part in parts if isinstance(part.get(_TIED), bool)]
    return any(flags) if flags else None


def embedding_of(name: str, tensors: Mapping[str, TensorEntry], roles: Mapping[str, Role]) -> str | None:
    """Another tensor that is an embedding of tokens of the same shape, the outermost of them; None if there is none.

    A classifier of two labels has the shape of BERT's embedding of segments, and nothing to do with it.
    """
    shape = tensors[name].shape
    if len(shape) != 2:
        return None
    same = [other for other in tensors if other != name and tensors[other].shape == shape]
    return min(
        (other for other in same if other in roles and roles[other].kind is Kind.EMBEDDING and has_tokens(other)),
        key=lambda other: other.count("."),
        default=None,
    )


def tied_tensors(checkpoint: Checkpoint, roles: Mapping[str, Role]) -> dict[str, str]:
    """Tensors that are stored although transformers makes them from another one: name -> that one.

    Heads that config.json ties to an embedding of their shape. Where it says nothing, heads that are equal to it; and
    where it does not say that nothing is tied, copies of an embedding that is called shared (T5, BART), and whatever
    a file of torch.save has as the very same bytes. Values are read only if a head or a copy is stored. Without
    config.json nothing is tied.
    """
    said = ties(checkpoint.config)
    found = {}
    for name, role in roles.items():
        if role.kind not in (Kind.HEAD, Kind.EMBEDDING) or not checkpoint.config:
            continue
        embedding = embedding_of(name, checkpoint.tensors, roles)
        if embedding is None:
            continue
        head = role.kind is Kind.HEAD
        if said is True and head:
            found[name] = embedding
        elif said is not False and (head or name.count(".") > embedding.count(".")):
            shared = checkpoint.tensors[name].same_bytes(checkpoint.tensors[embedding])
            copied = head or "shared" in embedding.split(".")
            if shared or (copied and same_values(checkpoint, name, embedding)):
                found[name] = embedding
    return found


def says_tied(checkpoint: Checkpoint, tied: Mapping[str, str], roles: Mapping[str, Role]) -> Checkpoint:
    """The checkpoint whose config.json says that its head is tied, if it is, and the file leaves it to the class."""
    if ties(checkpoint.config) is not None or not any(roles[name].kind is Kind.HEAD for name in tied):
        return checkpoint
    config = {**checkpoint.config, _TIED: True}
    if isinstance(nested := config.get("text_config"), Mapping):
        config["text_config"] = {**nested, _TIED: True}
    return replace(checkpoint, config=config)


def same_values(checkpoint: Checkpoint, name: str, other: str) -> bool:
    """Whether two tensors of a checkpoint are equal byte for byte; reads them, unless they are the same bytes.

    Of a checkpoint that is only planned yet they are not: a head that is a copy is not planned.
    """
    one, two = checkpoint.tensors[name], checkpoint.tensors[other]
    if one.same_bytes(two):
        return True
    if not checkpoint.stamps:
        return False
    if (one.dtype, one.shape) != (two.dtype, two.shape) or not one.shape or not one.nbytes:
        return False
    with Reader(checkpoint.stamps) as reader:
        return same_bytes(reader, one, two)
