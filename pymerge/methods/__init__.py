"""The merge methods. `METHODS` maps the names of configs to them."""

from __future__ import annotations

import difflib

from pymerge.errors import ConfigError
from pymerge.methods.ace import Ace
from pymerge.methods.average import Linear, TaskArithmetic
from pymerge.methods.base import Method
from pymerge.methods.elementwise import ArceeFusion, NearSwap, Passthrough, Ram, RamPlus, Sce
from pymerge.methods.flow import Swudi, SwudiA, WudiFlow
from pymerge.methods.singular import IsoC, IsoCts, TsvM
from pymerge.methods.sparse import SPARSE_METHODS
from pymerge.methods.spherical import Karcher, MultiSlerp, NuSlerp, Slerp
from pymerge.methods.stock import ModelStock
from pymerge.methods.wudi import Wudi

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(Linear(), TaskArithmetic(), *SPARSE_METHODS, Wudi(), WudiFlow(), Swudi(), SwudiA(), Ace()),
        *(TsvM(), IsoC(), IsoCts()),
        *(Slerp(), NuSlerp(), MultiSlerp(), Karcher(), ModelStock(), Sce(), NearSwap()),
        *(Ram(), RamPlus(), ArceeFusion(), Passthrough()),
    )
}


def get_method(name: str) -> Method:
    """The method called `name`; ConfigError with the nearest known name if there is none."""
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "known methods: " + ", ".join(METHODS)
    raise ConfigError(f"unknown merge method {name!r}; {hint}")
