"""Settings of the output's vocabulary: whose tokens it has, and whose rows they get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

UNION, BASE = "union", "base"


@dataclass(frozen=True)
class TokenSource:
    """Where a token's row comes from: a model's row of that token, of another `token` or `token_id`, or zeros."""

    model: str | None = None  # None: zeros
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True)
class TokenRule:
    """What the config says about one token; without `source` the donor is chosen as for other tokens."""

    source: TokenSource | None = None
    force: bool = False


@dataclass(frozen=True)
class TokenizerSettings:
    """Which vocabulary the output has: `union`, `base`, or that of the model named by `source`."""

    source: str = UNION
    tokens: Mapping[str, TokenRule] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    key: str = "tokenizer"  # of the config, for messages
