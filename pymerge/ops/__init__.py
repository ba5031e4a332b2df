"""The numerical operations, one module each, with a check and a plain-PyTorch reference. The folder is their list."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from pymerge.ops._op import Op


class _Ops(Mapping[str, "type[Op[Any]]"]):
    """The ops by name: `sparse_combine` is the class SparseCombine of the module of that name."""

    def __init__(self) -> None:
        modules = pkgutil.iter_modules(__path__)
        self._names = sorted(module.name for module in modules if not module.ispkg and not module.name.startswith("_"))

    def __getitem__(self, name: str) -> type[Op[Any]]:
        if name not in self._names:
            raise KeyError(name)
        module = import_module(f"pymerge.ops.{name}")
        found: type[Op[Any]] = getattr(module, "".join(part.capitalize() for part in name.split("_")))
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without importing it

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


OPS: Mapping[str, type[Op[Any]]] = _Ops()
