"""The merge methods. `METHODS` maps the names of configs to them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from importlib import import_module

from pymerge.errors import ConfigError
from pymerge.methods.base import Method

# The module that has each method in its `METHODS`.
_HOMES = {
    "linear": "average",
    "task_arithmetic": "average",
    "ties": "sparse",
    "dare_linear": "sparse",
    "dare_ties": "sparse",
    "della": "sparse",
    "della_linear": "sparse",
    "breadcrumbs": "sparse",
    "breadcrumbs_ties": "sparse",
    "wudi": "wudi",
    "wudi_flow": "flow",
    "swudi": "flow",
    "swudi_a": "flow",
    "ace": "ace",
    "tsv_m": "singular",
    "iso_c": "singular",
    "iso_cts": "singular",
    "slerp": "spherical",
    "nuslerp": "spherical",
    "multislerp": "spherical",
    "karcher": "spherical",
    "model_stock": "stock",
    "sce": "elementwise",
    "nearswap": "elementwise",
    "ram": "elementwise",
    "ramplus_tl": "elementwise",
    "arcee_fusion": "elementwise",
    "passthrough": "average",
}


class _Methods(Mapping[str, Method]):
    """Imports a method's module when it is asked for: most of them need PyTorch."""

    def __getitem__(self, name: str) -> Method:
        methods: tuple[Method, ...] = import_module(f"pymerge.methods.{_HOMES[name]}").METHODS
        return next(method for method in methods if method.name == name)

    def __iter__(self) -> Iterator[str]:
        return iter(_HOMES)

    def __len__(self) -> int:
        return len(_HOMES)

    def __contains__(self, name: object) -> bool:
        return name in _HOMES


METHODS: Mapping[str, Method] = _Methods()


def get_method(name: str) -> Method:
    """The method called `name`; ConfigError with the nearest known name if there is none."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "known methods: " + ", ".join(METHODS)
    raise ConfigError(f"unknown merge method {name!r}; {hint}")
