"""ResMerge through the interface: dtypes, limits, files. Its formula is tested with the op."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import pymerge
from pymerge.backends.runner import Runner
from pymerge.errors import ArgumentError
from pymerge.methods import METHODS
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.methods import check_files_are_memory
from tests.helpers.oracles import resmerge_delta
from tests.helpers.solvers import merged_delta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_matches_the_published_steps(dtype):
    base, experts = make_weights(31, 20, 4, dtype=dtype)
    arrays = [as_float64(tensor) for tensor in (base, *experts)]
    found = merged_delta(base, experts, "resmerge")
    assert relative_error(found, resmerge_delta(arrays[0], arrays[1:])) < 1e-6
    other = merged_delta(base, experts, "resmerge", exponent_max=1.5, exponent_min=0.2, head=0.9, scale=0.5)
    assert relative_error(other, 0.5 * resmerge_delta(arrays[0], arrays[1:], 1.5, 0.2, 0.9)) < 1e-6


def test_exponents_in_the_wrong_order_are_refused():
    with pytest.raises(ArgumentError, match=r"exponent_min 0.7 is above exponent_max 0.5; exchange them"):
        pymerge.merge_tensors(*make_weights(6, 8, 2), "resmerge", exponent_max=0.5)


def test_untouched_and_broken_tensors():
    base, experts = make_weights(6, 8, 2)
    assert torch.equal(pymerge.merge_tensors(base, [base, base.clone()], "resmerge"), base)
    experts[1][0, 0] = math.inf
    action = METHODS["resmerge"].action("x", True, METHODS["resmerge"].defaults(2), 2)
    assert action.run(Runner(), base, experts, "F32").isnan().all()


def test_files_give_what_tensors_in_memory_give(tmp_path: Path):
    check_files_are_memory(tmp_path, "resmerge")
