"""config.json of a model whose number of layers has changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_COUNTS = re.compile(r"num_hidden_layers|n_layers?|num_layers|depth|(num_)?(encoder|decoder)_layers")
_OTHER_TOWERS = re.compile(r"vision|visual|audio|speech|image")
# Numbers of single layers inside: they cannot be moved along without knowing the architecture.
_NUMBERED = re.compile(r".*layers?(_idx|_idxs|_ids|_indices)?$|.*layer_ind(ex|ices)$")


class NoLayerCountError(ValueError):
    """config.json does not say how many layers there are."""


def resized(
    config: Mapping[str, Any], blocks: str, old: int, order: Sequence[tuple[Mapping[str, Any], int]]
) -> tuple[dict[str, Any], list[str]]:
    """config.json with the number of layers, and lists with an entry for each, as in the output.

    Args:
        config: of the donor.
        blocks: path of the layers ("model.layers"): the tower whose number is meant.
        old: the donor's number of layers there.
        order: for each layer of the output the config.json that its layer comes from, and its number there.

    Returns:
        The new config, and the keys that number single layers and were left as they are.

    Raises:
        NoLayerCountError: no key has the donor's number.
    """
    result = copy.deepcopy(dict(config))
    sections = [(path, section) for path, section in _sections(result) if _counts(section, old, blocks)]
    foreign = bool(_OTHER_TOWERS.search(blocks))
    fitting = [item for item in sections if foreign == bool(_OTHER_TOWERS.search(".".join(item[0])))] or sections
    if not fitting:
        raise NoLayerCountError
    path, section = fitting[0]
    for key in _counts(section, old, blocks):
        section[key] = len(order)
    left = []
    for key, value in section.items():
        values = value if isinstance(value, list) else []
        if values and len(values) == old and (key == "no_rope_layers" or all(isinstance(item, str) for item in values)):
            section[key] = [_at(source, path, key, number, values) for source, number in order]
        elif (values and _NUMBERED.fullmatch(key)) or (key == "first_k_dense_replace" and value):
            left.append(key)
    return result, left


def _counts(section: Mapping[str, Any], old: int, blocks: str) -> list[str]:
    """Keys of the number of layers; in a model of encoder and decoder, of the one that is meant."""
    keys = [key for key, value in section.items() if _COUNTS.fullmatch(key) and value == old and value is not True]
    side = "decoder" if "decoder" in blocks else "encoder" if "encoder" in blocks else None
    other = {"decoder": "encoder", "encoder": "decoder"}.get(side or "")
    keys = [key for key in keys if other is None or other not in key]
    named = [key for key in keys if side is not None and side in key]
    return named if side == "decoder" and named else keys  # what names no side is the encoder's


def _sections(config: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    yield path, config
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _sections(value, (*path, key))


def _at(config: Mapping[str, Any], path: Sequence[str], key: str, number: int, default: list[Any]) -> Any:
    """Entry `number` of the same list in another model's config; of the donor's if that has none."""
    part: Any = config
    for name in path:
        part = part.get(name) if isinstance(part, Mapping) else None
    values = part.get(key) if isinstance(part, Mapping) else None
    known = values if isinstance(values, list) and number < len(values) else default
    return known[min(number, len(known) - 1)]
