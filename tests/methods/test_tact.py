"""TACT against its formula in float64."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import pymerge
from pymerge.backends.runner import Runner
from pymerge.methods import METHODS
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.methods import check_files_are_memory
from tests.helpers.oracles import tact_delta
from tests.helpers.solvers import merged_delta

# (d_out, d_in, T): small, tall, wide, one row, one column, one task.
SHAPES = [(7, 9, 3), (96, 64, 8), (40, 96, 4), (1, 16, 3), (16, 1, 1), (12, 10, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kappa", [0.5, 1.0])
def test_matches_the_published_form(shape, dtype, kappa):
    d_out, d_in, tasks = shape
    base, experts = make_weights(d_out, d_in, tasks, dtype=dtype)
    expected = tact_delta(as_float64(base), [as_float64(expert) for expert in experts], kappa)
    found = merged_delta(base, experts, "tact", kappa=kappa)
    assert relative_error(found, expected) < (1e-9 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("kappa", [0.5, 1.0])
def test_one_task_of_full_rank_and_equal_tasks_come_back(kappa):
    base = torch.randn(24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expert = base + 1e-3 * torch.randn(24, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    tau = as_float64(expert - base)
    assert relative_error(merged_delta(base, [expert], "tact", kappa=kappa), tau) < 1e-9
    assert relative_error(merged_delta(base, [expert] * 3, "tact", kappa=kappa), tau) < 1e-9


def test_the_cutoff_is_that_of_float32_in_every_precision():
    """Of 64 inputs, directions below 64 * 1.19e-7 of the largest eigenvalue are 0, in float64 too."""
    generator = torch.Generator().manual_seed(1)
    U, V = (np.linalg.qr(as_float64(torch.randn(64, 64, dtype=torch.float64, generator=generator)))[0] for _ in "UV")
    s = np.where(np.arange(64) < 40, 1.0, 2e-3)  # eigenvalues 4e-6 of the largest
    tau = U * s @ V.T
    base = torch.zeros(64, 64, dtype=torch.float64)
    found = merged_delta(base, [torch.from_numpy(tau)], "tact", kappa=1.0)
    assert relative_error(found, U[:, :40] @ V[:, :40].T) < 1e-9


def test_scales_with_the_deltas_and_by_scale():
    base, experts = make_weights(32, 48, 4, dtype=torch.float64)
    large = [base + 64 * (expert - base) for expert in experts]
    X = merged_delta(base, experts, "tact")
    assert relative_error(merged_delta(base, large, "tact"), 64 * X) < 1e-9
    assert relative_error(merged_delta(base, experts, "tact", scale=0.5), 0.5 * X) < 1e-9


def test_untouched_and_broken_tensors():
    base, experts = make_weights(6, 8, 2)
    assert torch.equal(pymerge.merge_tensors(base, [base, base.clone()], "tact"), base)
    without = pymerge.merge_tensors(base, experts, "tact", dtype=torch.float64)
    assert torch.equal(pymerge.merge_tensors(base, [*experts, base], "tact", dtype=torch.float64), without)
    experts[1][0, 0] = math.inf
    action = METHODS["tact"].action("x", True, METHODS["tact"].defaults(2), 2)
    assert action.run(Runner(), base, experts, "F32").isnan().all()


def test_files_give_what_tensors_in_memory_give(tmp_path: Path):
    check_files_are_memory(tmp_path, "tact")
