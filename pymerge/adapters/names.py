"""Modules of an adapter under the names that its base has for them: with another beginning, or found by their end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from pymerge.architecture.words import is_embedding_name, is_head_name

# Words for the same module in files and in memory: transformers 5 holds Mixtral's MLP under another name.
_SAME = {"mlp": "block_sparse_moe", "block_sparse_moe": "mlp"}


class AmbiguousModule(ValueError):
    """Several modules of the base would do."""


@dataclass(frozen=True)
class Beginning:
    """A beginning, with its last dot, that modules of an adapter have beyond those of the base, or lack (`added`)."""

    text: str
    added: bool

    def apply(self, module: str) -> str | None:
        """The base's name of a module; None if it begins otherwise."""
        if self.added:
            return self.text + module
        return module[len(self.text) :] if module.startswith(self.text) else None

    def describe(self) -> str:
        """Words for what is done to names."""
        return f"{self.text!r} {'put before' if self.added else 'taken away from'} its names"


@dataclass(frozen=True)
class Placed:
    """Names of modules in the base, by those of the adapter; a `beginning` that made the difference; `lost` modules."""

    modules: Mapping[str, str]
    lost: tuple[str, ...] = ()
    beginning: Beginning | None = None

    def name(self, tensor: str) -> str:
        """The base's name of a whole tensor, as far as its module is known."""
        module, dot, last = tensor.rpartition(".")
        if module in self.modules:
            return f"{self.modules[module]}{dot}{last}"
        moved = self.beginning.apply(module) if self.beginning and module else None
        return tensor if moved is None else f"{moved}.{last}".lstrip(".")


def place(wanted: Iterable[str], known: Collection[str]) -> Placed:
    """Find modules of an adapter among those `known` of its base.

    All have one beginning more or less, or each is the only one that ends as it does, from its block on. Raises
    AmbiguousModule where several would do.
    """
    wanted = list(dict.fromkeys(wanted))
    found = {module: module for module in wanted if module in known}
    missing = [module for module in wanted if module not in found]
    if not missing:
        return Placed(found)
    beginning = _beginning(missing, known)
    if beginning is not None:
        moved = {module: new for module in missing if (new := beginning.apply(module)) is not None}
        return Placed(found | moved, (), beginning)
    ends: dict[str, list[str]] = {}
    for module in known:
        ends.setdefault(_end(module), []).append(module)
    lost = []
    for module in missing:
        fitting = next((fits for end in _spelled(_end(module)) if (fits := ends.get(end))), [])
        if len(fitting) > 1:
            raise AmbiguousModule(f"{module} could be {' or '.join(sorted(fitting)[:4])}")
        if fitting:
            found[module] = fitting[0]
        else:
            lost.append(module)
    return Placed(found, tuple(lost))


def _beginning(missing: Collection[str], known: Collection[str]) -> Beginning | None:
    """The one beginning by which all missing modules are known. Raises AmbiguousModule for several."""
    first = next(iter(missing))
    found = Counter(Beginning(text, False) for text, rest in _split(first) if rest in known)
    found.update(Beginning(module[: -len(first)], True) for module in known if module.endswith(f".{first}"))
    whole = [each for each in found if all(each.apply(module) in known for module in missing)]
    if len(whole) > 1:
        raise AmbiguousModule(", or ".join(sorted(each.describe() for each in whole)))
    return whole[0] if whole else None


def _split(name: str) -> Iterator[tuple[str, str]]:
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1], name[at + 1 :]
        at = name.find(".", at + 1)


def _end(module: str) -> str:
    """The end of a name that says what it is: from the list of its block on, layers.7.self_attn.q_proj; outside of
    blocks the word of a table or head, else two words, for there is a dense in many a head."""
    words = module.split(".")
    block = next((i for i, word in enumerate(words) if i > 0 and word.isdecimal()), None)
    if block is not None:
        return ".".join(words[block - 1 :])
    alone = is_embedding_name(words[-1]) or is_head_name(f"{words[-1]}.weight")
    return ".".join(words[-1:] if alone else words[-2:])


def _spelled(end: str) -> Iterator[str]:
    yield end
    other = ".".join(_SAME.get(word, word) for word in end.split("."))
    if other != end:
        yield other
