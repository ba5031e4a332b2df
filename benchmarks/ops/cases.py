"""All cases: of each op one of its name; a further one has a name of its own behind a dash.

Its times are reported, and `auto` chooses by the first. tests/repository/test_benchmarks.py says which ops have none.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.ops import dense, elementwise, routed, sparse, spectral
from benchmarks.ops.case import Case

CASES: Mapping[str, Case] = routed.CASES | elementwise.CASES | sparse.CASES | dense.CASES | spectral.CASES


def op_of(name: str) -> str:
    """The op of a case."""
    return name.partition("-")[0]
