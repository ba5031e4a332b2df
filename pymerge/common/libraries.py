"""Checks that a library is there, in a version that fits."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version

from pymerge.errors import ArgumentError

# Extra of pyproject.toml -> its packages: name, the first version that fits, and the first that no longer does.
LIBRARIES: dict[str, tuple[tuple[str, str, str | None], ...]] = {
    "mergekit": (("mergekit", "0.1.5", "0.2"),),
    "evolve": (("mergekit", "0.1.5", "0.2"), ("cma", "4", None), ("lm_eval", "0.4.8", None), ("ray", "2.40", None)),
    "fusion-bench": (("fusion-bench", "0.2.33", None),),
    "peft": (("peft", "0.18", None),),
    "ray": (("ray", "2.40", None),),
    "collect": (("transformers", "4.46", None), ("tokenizers", "0.20", None), ("pillow", "10", None)),
    "search": (("deap", "1.4", None), ("scipy", "1.11", None)),
}


def require(extra: str) -> None:
    """Raise ArgumentError, with the command that installs them, unless the libraries of an extra are there and fit."""
    for package, least, below in LIBRARIES[extra]:
        _require(package, least, below, f"pip install 'pymerge-engine[{extra}]'")


def _require(package: str, least: str, below: str | None, remedy: str) -> None:
    try:
        found = version(package)
    except PackageNotFoundError as error:
        raise ArgumentError(f"{package} is not installed; {remedy}") from error
    if _release(found) < _release(least) or (below is not None and _release(found) >= _release(below)):
        wanted = f"{least} or later" + (f", before {below}" if below else "")
        raise ArgumentError(f"{package} {found} is installed, and {wanted} is needed; {remedy}")


def _release(text: str) -> tuple[int, ...]:
    """The numbers of a version: (0, 1, 5) of 0.1.5rc1."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
