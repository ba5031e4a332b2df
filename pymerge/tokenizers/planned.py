"""Plan of the output's tokenizer and vocabulary."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pymerge.tokenizers.files import Files

if TYPE_CHECKING:
    from pymerge.checkpoint.row_map import RowMap


@dataclass(frozen=True)
class TokenPlan:
    """Plan of tokenizer and vocabulary. Without tokenizer keys it is empty: all is carried over from the donor.

    `files` are written, whatever the donor has by their names, and `dropped` is what of the donor is not carried over;
    `config` are keys of config.json with their new values; `lines` tell people; `digest` stands for all that decides.
    """

    files: Files = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    config: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    digest: str = ""


def plan_files(
    written: Files,
    carried: Files,
    config: Mapping[str, Any] | None = None,
    lines: Sequence[str] = (),
    maps: Sequence[RowMap] = (),
) -> TokenPlan:
    """The plan of an output with the files `written`, where the donor has `carried`; the others are the donor's."""
    keys = config or {}
    files = {name: data for name, data in sorted(written.items()) if carried.get(name) != data}
    dropped = frozenset(carried) - set(written)
    said = list(lines)
    if files:
        said.append(f"  written: {', '.join(files)}")
    if dropped:
        said.append(f"  not carried over: {', '.join(sorted(dropped))}")
    digest = hashlib.sha256(json.dumps([sorted(dropped), sorted(keys.items())]).encode())
    for name, data in files.items():
        digest.update(f"{name} {len(data)} ".encode() + data)
    for rows_map in maps:
        digest.update(rows_map.digest().encode())
    return TokenPlan(files, dropped, keys, tuple(said), digest.hexdigest())


def describe_rows(rows_map: RowMap, own: int) -> str:
    """Origins of a table's rows with their numbers, for people; `own` is the number of the model's own table."""
    from pymerge.checkpoint.row_map import AVERAGE, MEAN, ZERO

    if rows_map.is_identity(own):
        return "all rows where they are"
    counts = {
        "own": rows_map.source == own,
        "of other models": (rows_map.source >= 0) & (rows_map.source != own),
        "averages": rows_map.source == AVERAGE,
        "zeros": rows_map.source == ZERO,
        "padding, the mean of the others": rows_map.source == MEAN,
    }
    return "rows: " + ", ".join(f"{int(rows.sum()):,} {what}" for what, rows in counts.items() if rows.any())
