"""Settings of the output's vocabulary: whose tokens it has, and whose rows they get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

UNION, BASE = "union", "base"


@dataclass(frozen=True)
class TokenSource:
    """Origin of a token's row: a model's row of that token, of another `token` or `token_id`, or zeros."""

    model: str | None = None  # None: zeros
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenRule:
    """Rule of the config for one token; without `source` the donor is chosen as for other tokens."""

    source: TokenSource | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """Settings of the output's vocabulary: `union`, `base`, or that of the model named by `source`."""

    source: str = UNION
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    key: str = "tokenizer"  # of the config, for messages
