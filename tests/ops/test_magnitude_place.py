"""magnitude_place against NumPy's places of the same keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.ops.magnitude_place import MagnitudePlace
from pymerge.testing.cases import LAYOUTS, implementations, task_case
from tests.helpers.arrays import with_arrays
from tests.helpers.sparse import delta, weights

BACKENDS = ["reference", *[name for name, device in implementations("magnitude_place") if device == "cpu"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1,), (63, 65), (300_000,)], ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_the_place_behind_an_element_of_a_magnitude(backend: str, shape: tuple[int, ...], with_base: bool) -> None:
    base, (expert,) = weights(shape, torch.bfloat16, torch.bfloat16, ties=True)
    origin, run = base if with_base else None, Runner(backend)
    keys = np.abs(delta(base if with_base else torch.zeros_like(base), expert)).view(np.int32).reshape(-1)
    for key in np.unique(keys).tolist():
        places = np.flatnonzero(keys == key)
        for count in sorted({1, 1 + len(places) // 2, len(places)}):
            op = MagnitudePlace(origin, expert, key, count)
            assert run(op) == places[count - 1] + 1
            if backend == "native":
                assert run(with_arrays(op)) == places[count - 1] + 1
        assert run(MagnitudePlace(origin, expert, key, len(places) + 1)) == len(keys)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    case = task_case((30, 111), [torch.bfloat16, torch.bfloat16], layout=layout)
    keys = np.abs(delta(case.base, case.experts[0])).view(np.int32).reshape(-1)
    for backend in BACKENDS:
        assert Runner(backend)(MagnitudePlace(case.base, case.experts[0], int(keys[1000]), 1)) == 1 + int(
            np.flatnonzero(keys == keys[1000])[0]
        )


def test_float64_is_searched_in_float64() -> None:
    expert = torch.tensor([1.0, 1.0 + 2.0**-40, -1.0 - 2.0**-40], dtype=torch.float64)
    key = int(expert.view(torch.int64)[1])
    for backend in BACKENDS:
        assert [Runner(backend)(MagnitudePlace(None, expert, key, count)) for count in (1, 2)] == [2, 3]
        narrow = MagnitudePlace(None, expert.float(), int(expert.float().view(torch.int32)[0]) + (1 << 32), 1)
        assert Runner(backend)(narrow) == 3  # no float32 has a key of so many bits


def test_a_count_of_nothing_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="count 0; give at least 1"):
        Runner()(MagnitudePlace(None, torch.zeros(3), 0, 0))
