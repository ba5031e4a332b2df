"""Pages whose numbers come from benchmarks/results: tables between markers, and numbers in sentences.

A `Block` is all lines between `<!-- table: NAME -->` and `<!-- end -->`. A `Said` is a piece of a sentence with `{}` in
place of each number; it is found in the page whatever its numbers are, and wherever its lines break.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.harness.results import ROOT

NUMBER = r"(-?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?)"


@dataclass(frozen=True)
class Block:
    """A table: `lines` of Markdown between the markers of `name` on `page`, a path in the checkout."""

    page: str
    name: str
    lines: Sequence[str]

    def write(self, text: str) -> str:
        """The page's text with these lines; SystemExit if its markers are not there once."""
        start, end = f"<!-- table: {self.name} -->\n", "<!-- end -->"
        if text.count(start) != 1:
            raise SystemExit(f"{self.page} has {start.strip()!r} {text.count(start)} times, not once")
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise SystemExit(f"{self.page}: {start.strip()} has no {end} behind it")
        return before + start + "".join(f"{line}\n" for line in self.lines) + end + after


@dataclass(frozen=True)
class Said:
    """A piece of a sentence on `page`, with `{}` for each of the `numbers`, which are as they are printed."""

    page: str
    words: str
    numbers: Sequence[str]

    def write(self, text: str) -> str:
        """The page's text with these numbers; SystemExit if the words are not there once."""
        parts = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in self.words.split("{}")]
        if len(parts) != len(self.numbers) + 1:
            raise SystemExit(f"{self.words!r} has {len(parts) - 1} numbers, not {len(self.numbers)}")
        found = list(re.finditer(NUMBER.join(parts), text))
        if len(found) != 1:
            raise SystemExit(f"{self.page} says {self.words!r} {len(found)} times, not once")
        for place, number in reversed(list(enumerate(self.numbers, 1))):
            text = text[: found[0].start(place)] + number + text[found[0].end(place) :]
        return text


Part = Block | Said


def written(parts: Iterable[Part]) -> dict[str, tuple[str, str]]:
    """Each page's text as it is, and as it should be: page -> (now, then)."""
    texts: dict[str, tuple[str, str]] = {}
    for part in parts:
        if part.page not in texts:
            now = (ROOT / part.page).read_text()
            texts[part.page] = (now, now)
        now, then = texts[part.page]
        texts[part.page] = (now, part.write(then))
    return texts


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    lines = (head, ["---"] * len(head), *rows)
    return ["|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in lines]


def short(value: float) -> str:
    """A small number with two digits: 1.1e-6."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"
