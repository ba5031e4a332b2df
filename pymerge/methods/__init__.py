"""The merge methods. `METHODS` maps the names of configs to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from pymerge.common.names import nearest
from pymerge.errors import ConfigError
from pymerge.methods.base import Method

# The module that has each method in its `METHODS`.
_HOMES = {
    "linear": "linear",
    "task_arithmetic": "linear",
    "ties": "ties",
    "dare_linear": "ties",
    "dare_ties": "ties",
    "della": "ties",
    "della_linear": "ties",
    "breadcrumbs": "ties",
    "breadcrumbs_ties": "ties",
    "wudi": "wudi",
    "wudi_flow": "wudi_flow",
    "swudi": "wudi_flow",
    "swudi_a": "wudi_flow",
    "ace": "ace",
    "weir": "weir",
    "tact": "tact",
    "regmean": "regmean",
    "regmean_pp": "regmean",
    "tsv_m": "singular",
    "dc_merge": "dc_merge",
    "star": "truncated",
    "cart": "truncated",
    "lore": "lore",
    "resmerge": "resmerge",
    "doge": "doge",
    "iso_c": "singular",
    "iso_cts": "singular",
    "knots": "aligned",
    "core_space": "aligned",
    "slerp": "slerp",
    "nuslerp": "slerp",
    "multislerp": "slerp",
    "karcher": "slerp",
    "model_stock": "model_stock",
    "sce": "sce",
    "nearswap": "nearswap",
    "ram": "ram",
    "ramplus_tl": "ram",
    "arcee_fusion": "arcee_fusion",
    "passthrough": "linear",
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
    near = nearest(name, METHODS)
    hint = f"did you mean {near!r}?" if near else "known methods: " + ", ".join(METHODS)
    raise ConfigError(f"unknown merge method {name!r}; {hint}")
