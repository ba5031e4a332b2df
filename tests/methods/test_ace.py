"""ace against its formulas in float64 (helpers/oracles.py)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import pymerge
from pymerge.backends.runner import Runner
from pymerge.methods.ace import SolveAce
from pymerge.methods.ace_forms import Tasks, by_numerator, by_products_of_rows, by_weights
from pymerge.ops.normal_equations import NormalEquations
from pymerge.ops.stacked_gram import StackedGram
from pymerge.ops.task_gram import TaskGram
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64, relative_error
from tests.helpers.oracles import ace_delta
from tests.helpers.solvers import DTYPES, SHAPES, merged_delta

ACE_TOLERANCE = 1e-5  # of X, float32
# A single row has no covariance to normalise (test_ace_one_row_forced): forcing it has no formula to match.
ACE_CASES = [
    (shape, threshold)
    for shape in SHAPES
    for threshold in (0.3, -1.0, float("inf"))
    if not (shape[0] == 1 and threshold < 0)
]


@pytest.mark.parametrize(("shape", "threshold"), ACE_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["released", "paper"])
def test_ace_matches_the_formulas(shape, dtype, variant, threshold):
    d_out, d_in, tasks, rank = shape
    base, experts = make_weights(d_out, d_in, tasks, rank=rank, dtype=dtype)
    expected = ace_delta(as_float64(base), [as_float64(expert) for expert in experts], 1e-5, threshold, 0.3, variant)
    found = merged_delta(base, experts, "ace", gamma_threshold=threshold, variant=variant)
    if d_out == 1 and variant == "released":  # centring leaves nothing of a single row
        assert np.abs(found).max() == 0
        assert np.abs(expected).max() == 0
    else:
        assert relative_error(found, expected) < ACE_TOLERANCE


@pytest.mark.parametrize("rms", [5e-4, 3e-3, 3e-2])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_ace_ill_conditioned_systems_are_solved_in_float64(rms, eps):
    """Large wide deltas with a small ridge: cond(S) reaches 1e5, far beyond float32."""
    base, experts = make_weights(24, 160, 3, rms=rms)
    expected = ace_delta(as_float64(base), [as_float64(expert) for expert in experts], eps, float("inf"))
    assert relative_error(merged_delta(base, experts, "ace", eps=eps), expected) < ACE_TOLERANCE


@pytest.mark.parametrize("shape", [(48, 240), (260, 90), (120, 130)])
@pytest.mark.parametrize(("eps", "dtype"), [(10.0, "F32"), (1e-5, "F64")])
def test_ace_forms_its_system_once(shape, eps, dtype):
    """The precision is decided before the products that cost the most."""
    base, experts = make_weights(*shape, 3, rms=1e-1)
    run, formed = Runner("auto", "cpu"), set()

    def record(op):
        formed.update([op.dtype] if isinstance(op, (NormalEquations, StackedGram, TaskGram)) else [])
        return run(op)

    SolveAce(eps, float("inf"), 0.3, "released", 1.0, "auto").run(record, base, experts, "F32")
    assert formed == {dtype}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    "shape", [(20, 100, 3), (100, 20, 3), (40, 40, 2), (40, 40, 8), (33, 70, 3), (17, 40, 1)], ids=str
)
def test_all_ways_to_compute_the_closed_form_agree(shape, double):
    """Each way gives the same X where it can be taken, to the rounding of its products."""
    rows, columns, count = shape
    base, experts = make_weights(rows, columns, count, rms=1e-2)
    wide = [each.double() for each in experts]
    means = torch.stack([(expert - base.double()).mean(dim=0) for expert in wide])
    tasks, run = Tasks(base, experts, means, 1e-2), Runner("auto", "cpu")
    expected = ace_delta(as_float64(base), [as_float64(expert) for expert in experts], 1e-2, float("inf"))
    system, tolerance = ("F64", 1e-12) if double else ("F32", 1e-5)
    forms = {
        "rows": by_products_of_rows(run, tasks, system, system, system)[0],
        "weights": by_weights(run, tasks, system, system, None)[0],
        "numerator": by_numerator(run, tasks, system, None)[0],
    }
    for form, X in forms.items():
        assert relative_error(as_float64(X), expected) < tolerance, form


def test_scale_free_heterogeneity_is_the_same_for_all_scales_and_the_released_one_is_not():
    """Norms a factor of 3 apart, in deltas of any size: by the released gamma they differ near norm 1 alone."""
    base = torch.zeros(12, 10, dtype=torch.float64)
    _, experts = make_weights(12, 10, 3, dtype=torch.float64)
    taus = [expert / expert.norm() * size for expert, size in zip(experts, (0.5, 1.0, 1.5), strict=True)]
    found: dict[tuple[str, float], bool] = {}
    for gamma in ("released", "scale_free"):
        for scale in (1e-2, 1.0, 1e2):
            own = [scale * tau for tau in taus]
            # A relative ridge, so that all but the choice between the formulas scales with the deltas.
            given = {"gamma": gamma, "eps": 1e-3 * scale**2}
            X, *either = (
                as_float64(pymerge.merge_tensors(base, own, "ace", **given, gamma_threshold=threshold))
                for threshold in (0.3, math.inf, -1.0)
            )
            assert any(np.array_equal(X, other) for other in either)
            found[gamma, scale] = np.array_equal(X, either[1])
    assert [found["released", scale] for scale in (1e-2, 1.0, 1e2)] == [False, True, False]
    assert [found["scale_free", scale] for scale in (1e-2, 1.0, 1e2)] == [True, True, True]


def test_ace_heterogeneity_decides_by_gamma():
    """Norms far apart switch the normalisation on, equal norms leave it off; forcing changes the result."""
    equal = make_weights(20, 24, 4, spread=0.0)
    apart = make_weights(20, 24, 4, rms=1e-2, spread=30.0)
    for (base, experts), heterogeneous in [(equal, False), (apart, True)]:
        default = merged_delta(base, experts, "ace")
        same = merged_delta(base, experts, "ace", gamma_threshold=-1.0 if heterogeneous else float("inf"))
        other = merged_delta(base, experts, "ace", gamma_threshold=float("inf") if heterogeneous else -1.0)
        np.testing.assert_array_equal(default, same)
        assert relative_error(default, other) > 1e-2


def test_ace_one_row_forced():
    """A one-row weight has no centred covariance: normalising it is impossible, and it gets the mean."""
    base, experts = make_weights(1, 16, 3)
    found = merged_delta(base, experts, "ace", gamma_threshold=-1.0)
    mean = sum(as_float64(expert) - as_float64(base) for expert in experts) / 3
    assert relative_error(found, mean) < 1e-5


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize(("shape", "tasks", "rank"), [((20, 16), 3, 1), ((24, 40), 2, 2), ((48, 24), 4, 1)], ids=str)
def test_ace_refines_low_rank_deltas_on_their_numerical_rank(shape, tasks, rank, variant):
    """Merged adapters: of k = 60 % of the directions only those of the deltas, whatever the last digits."""
    base, experts = make_weights(*shape, tasks, rank=rank, rms=1e-2, dtype=torch.float64)
    settings = {"variant": variant, "gamma_threshold": -1.0, "k_frac": 0.6}
    found = merged_delta(base, experts, "ace", **settings)
    arrays = [as_float64(expert) for expert in experts]
    assert relative_error(found, ace_delta(as_float64(base), arrays, 1e-5, -1.0, 0.6, variant)) < 1e-9
    noise = torch.Generator().manual_seed(1)
    moved = [expert + 1e-13 * torch.randn(shape, generator=noise, dtype=torch.float64) for expert in experts]
    assert relative_error(merged_delta(base, moved, "ace", **settings), found) < 1e-7
