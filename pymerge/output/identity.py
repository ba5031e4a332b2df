"""Identity of a merge, part by part, and the parts in which two merges differ.

An identity maps names of parts ("config parameters.iterations", "input /models/a.safetensors", "PyTorch version")
to texts. Merges of equal identities write the same bytes, so that only such a merge goes on where another stopped.
"""

from __future__ import annotations

from collections.abc import Mapping

Identity = dict[str, str]

_PARTS_SHOWN = 4
_SHOWN = 100  # characters of a value


def is_identity(value: object) -> bool:
    """Whether a value read from a file can be an identity."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def differences(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One text for each part that differs, such as "device (was cpu, is cuda)", in the order of names."""
    return [
        f"{part} (was {_shown(recorded.get(part))}, is {_shown(now.get(part))})"
        for part in sorted({*recorded, *now})
        if recorded.get(part) != now.get(part)
    ]


def describe(parts: list[str]) -> str:
    """Differences as the end of a sentence, with at most a few of them."""
    more = len(parts) - _PARTS_SHOWN
    return ", ".join(parts[:_PARTS_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shown(value: str | None) -> str:
    if value is None:
        return "absent"
    return value if len(value) <= _SHOWN else value[:_SHOWN] + "..."
