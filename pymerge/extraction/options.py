"""Options of an extraction, checked: how many singular values are kept, of which tensors, how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pymerge.common.dtypes import CODES
from pymerge.common.names import checked_pattern
from pymerge.errors import ArgumentError

Algorithm = Literal["auto", "random", "gram", "svd"]
CHOICES: Mapping[str, tuple[str, ...]] = {
    "embeddings": ("skip", "lora", "full"),
    "rest": ("skip", "full"),
    "dtype": ("float32", "bfloat16", "float16"),
    "algorithm": ("auto", "random", "gram", "svd"),
    "split": ("sqrt", "b", "a"),
}
# Without any word on ranks: as many as keep this share of the sum of s^2, and at most so many.
DEFAULT_ENERGY, DEFAULT_MAX_RANK = 0.99, 64


@dataclass(frozen=True)
class ExtractOptions:
    """Options that `pymerge.extract` documents; at most one of `rank`, `energy` and `sv_epsilon`."""

    rank: int | None = None
    energy: float | None = None
    sv_epsilon: float | None = None
    max_rank: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embeddings: str = "skip"
    rest: str = "skip"
    dtype: str = "float32"
    algorithm: str = "auto"
    split: str = "sqrt"
    seed: int = 0
    # What helps where a tensor cannot be worked out, by who gave the options.
    otherwise: str = field(default="give --algorithm svd, or --exclude it", compare=False)

    def __post_init__(self) -> None:
        """Raise ArgumentError unless all values are what they can be."""
        given = [name for name in ("rank", "energy", "sv_epsilon") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ArgumentError(f"{' and '.join(given)} say different things about the rank; give one of them")
        for name in ("rank", "max_rank"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ArgumentError(f"{name} is {value!r}; give a whole number of at least 1")
        for name in ("energy", "sv_epsilon"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ArgumentError(f"{name} is {value!r}; give a number")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ArgumentError(f"energy is {self.energy}; give a share of the sum of s^2 above 0 and at most 1")
        if self.sv_epsilon is not None and not 0.0 <= self.sv_epsilon < float("inf"):
            raise ArgumentError(f"sv_epsilon is {self.sv_epsilon}; give a singular value, at least 0")
        if type(self.seed) is not int or self.seed < 0:
            raise ArgumentError(f"seed is {self.seed!r}; give a whole number of at least 0")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        if self.algorithm == "random" and self.most is None:
            raise ArgumentError("algorithm random has to know the largest rank; give rank or max_rank as well")
        for pattern in (*self.include, *self.exclude):
            checked_pattern(pattern)

    @property
    def most(self) -> int | None:
        """The largest rank that a matrix can get by the options alone."""
        if self.rank is not None:
            return self.rank if self.max_rank is None else min(self.rank, self.max_rank)
        if self.energy is None and self.sv_epsilon is None:
            return self.max_rank or DEFAULT_MAX_RANK
        return self.max_rank

    @property
    def share(self) -> float | None:
        """Share of the sum of s^2 that is to be kept, where that decides."""
        if self.energy is not None:
            return self.energy
        return DEFAULT_ENERGY if self.rank is None and self.sv_epsilon is None else None

    @property
    def code(self) -> str:
        """Code of the output's dtype."""
        return CODES[self.dtype]

    def takes(self, name: str) -> bool:
        """Whether the tensor is asked for: some `include` finds its name, if there are any, and no `exclude`."""
        asked = not self.include or any(re.search(pattern, name) for pattern in self.include)
        return asked and not any(re.search(pattern, name) for pattern in self.exclude)

    def values(self) -> dict[str, Any]:
        """All options by name, as JSON has them."""
        values = {name: value for name, value in asdict(self).items() if name != "otherwise"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
