"""The formulas that `quality explore` tries, against float64 forms of their own, and their merges in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import pymerge
from benchmarks.quality import explore, formulas
from benchmarks.quality.cases import FLOW
from benchmarks.quality.glyph_suite import GlyphSuite
from benchmarks.quality.ideas import ideas
from benchmarks.quality.subject import Subject
from benchmarks.quality.suite import scores
from pymerge.ops.temper_spectrum import TemperSpectrum

T, ROWS, COLUMNS = 3, 5, 7


@pytest.fixture
def taus() -> list[Tensor]:
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(ROWS, COLUMNS, generator=rng) for _ in range(T)]


def unit_gram(matrix: Tensor) -> Tensor:
    double = matrix.double()
    return double.T @ double / double.pow(2).sum()


@pytest.mark.parametrize("start", [1.0, 1 / T])
def test_flow_is_the_solution_of_the_differential_equation(taus: list[Tensor], start: float) -> None:
    A = torch.stack([unit_gram(tau) for tau in taus]).sum(0)
    B = torch.stack([tau.double() @ unit_gram(tau) for tau in taus]).sum(0)
    X0 = start * torch.stack(taus).double().sum(0)
    decay = torch.matrix_exp(-2.5 * A)
    expected = X0 @ decay + B @ torch.linalg.pinv(A) @ (torch.eye(COLUMNS) - decay)
    torch.testing.assert_close(formulas.flow(taus, 2.5, start=start), expected.float(), rtol=1e-4, atol=1e-5)


def test_a_task_that_did_not_touch_the_matrix_has_no_part_in_the_equations(taus: list[Tensor]) -> None:
    with_zero = formulas.flow([*taus, torch.zeros(ROWS, COLUMNS)])
    assert torch.equal(with_zero, formulas.flow(taus))


def test_powers_of_gram_matrices(taus: list[Tensor]) -> None:
    tau = taus[0].T.contiguous()  # of full column rank
    values, vectors = torch.linalg.eigh((tau.T @ tau).double())
    likeness = formulas.with_power(tau, 0.5).double()
    torch.testing.assert_close(likeness.T @ likeness, vectors @ values.sqrt().diag() @ vectors.T, rtol=1e-5, atol=1e-5)


def test_two_sided_ends_at_the_solution_of_the_kronecker_system(taus: list[Tensor]) -> None:
    left, right = torch.zeros(35, 35, dtype=torch.float64), torch.zeros(35, dtype=torch.float64)
    for tau in taus:
        values, vectors = torch.linalg.eigh((tau @ tau.T).double())
        H = vectors @ values.sqrt().diag() @ vectors.T / values.sqrt().mean()
        system = torch.kron(0.7 * H + 0.3 * torch.eye(ROWS), unit_gram(tau))
        left += system
        right += system @ tau.double().reshape(-1)
    expected = torch.linalg.solve(left, right).reshape(ROWS, COLUMNS)
    found = formulas.two_sided(taus, 0.5, 0.3, steps=150)
    torch.testing.assert_close(found, expected.float(), rtol=2e-3, atol=2e-3)


def test_two_sided_takes_its_matrices_of_likenesses(taus: list[Tensor]) -> None:
    assert torch.equal(formulas.halfway(taus, taus), formulas.halfway(taus))
    halves = [tau / 2 for tau in taus]  # matrices are of trace 1, so their scale is none
    torch.testing.assert_close(formulas.halfway(taus, halves), formulas.halfway(taus), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(formulas.halfway(taus, [tau.flip(0, 1) for tau in taus]), formulas.halfway(taus))


@pytest.mark.parametrize("relative", [False, True])
def test_as_long_as_a_task_is_the_flow_from_the_mean_where_it_is_so_long(taus: list[Tensor], relative: bool) -> None:
    taus = [tau * size for tau, size in zip(taus, (1.0, 0.5, 2.0), strict=True)]
    squares = [float(tau.double().square().sum()) for tau in taus]
    weights = [1 / square for square in squares] if relative else [1.0] * T
    weights = [T * weight / sum(weights) for weight in weights]
    grams = [weight * unit_gram(tau) for weight, tau in zip(weights, taus, strict=True)]
    A, B = torch.stack(grams).sum(0), torch.stack([tau.double() @ K for tau, K in zip(taus, grams, strict=True)]).sum(0)
    found = formulas.as_long_as_a_task(taus, relative).double()
    goal = (sum(squares) / T) ** 0.5
    assert float(found.norm()) == pytest.approx(goal, rel=1e-5)
    mean = torch.stack(taus).double().mean(0)
    inverse = torch.linalg.pinv(A)

    def at(time: float) -> Tensor:
        decay = torch.matrix_exp(-time * A)
        return mean @ decay + B @ inverse @ (torch.eye(COLUMNS) - decay)

    low, high = 0.0, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float(at(middle).norm()) < goal else (low, middle)
    torch.testing.assert_close(found, at(low), rtol=1e-4, atol=1e-4)


def test_as_long_as_a_task_ends_where_the_flow_does_if_that_is_shorter(taus: list[Tensor]) -> None:
    opposed = [taus[0], -taus[0]]
    torch.testing.assert_close(formulas.as_long_as_a_task(opposed, True), torch.zeros(ROWS, COLUMNS))


@pytest.mark.parametrize("least", [1.0, 1 / T])
def test_calibrated_divides_by_the_mean_of_what_the_tasks_keep(taus: list[Tensor], least: float) -> None:
    X = torch.stack(taus).sum(0)
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    expected = torch.zeros_like(X).double()
    for u, s, v in zip(U.T, S, Vh, strict=True):
        kept = [max(float(s * v @ (u @ tau.double()) / (u @ tau.double()).square().sum()), least) for tau in taus]
        expected += s * T / sum(kept) * torch.outer(u, v)
    torch.testing.assert_close(formulas.calibrated(X, taus, least), expected.float())


def test_capped_and_raised_change_the_ends_of_the_spectrum(taus: list[Tensor]) -> None:
    values = torch.linalg.svdvals(taus[0])
    mean = float(values.mean())
    capped, raised = formulas.capped(taus[0], 1.2), formulas.raised(taus[0], 0.8)
    torch.testing.assert_close(torch.linalg.svdvals(capped), values.clamp(max=1.2 * mean))
    torch.testing.assert_close(torch.linalg.svdvals(raised), values.clamp(min=0.8 * mean))
    torch.testing.assert_close(formulas.capped(taus[0], 10.0), taus[0])


def test_one_task_is_itself(taus: list[Tensor]) -> None:
    for formula in (
        formulas.flow,
        lambda one: formulas.towards_mean(one, 0.3),
        lambda one: formulas.two_sided(one, 0.5, 0.3, 5),
        lambda one: formulas.regression(one, [torch.eye(COLUMNS)]),
        lambda one: formulas.as_long_as_a_task(one, True),
        lambda one: formulas.calibrated(one[0], one, 1.0),
    ):
        torch.testing.assert_close(formula(taus[:1]), taus[0], rtol=1e-5, atol=1e-5)


def test_a_large_ridge_is_the_mean(taus: list[Tensor]) -> None:
    mean = torch.stack(taus).mean(0)
    torch.testing.assert_close(formulas.towards_mean(taus, 1e6), mean, rtol=1e-4, atol=1e-5)


def test_regression_has_no_gradient_left(taus: list[Tensor]) -> None:
    rng = torch.Generator().manual_seed(4)
    moments = [x.T @ x for x in (torch.randn(20, COLUMNS, generator=rng) for _ in taus)]
    X = formulas.regression(taus, moments, ridge=0.0).double()
    gradient = sum((X - tau) @ (moment / moment.trace()).double() for tau, moment in zip(taus, moments, strict=True))
    assert float(torch.as_tensor(gradient).abs().max()) < 1e-5


def test_trimmed_keeps_the_largest() -> None:
    found = formulas.trimmed(torch.tensor([[1.0, -4.0], [3.0, -2.0]]), 0.5)
    assert found.tolist() == [[0.0, -4.0], [3.0, 0.0]]


def test_flattened_keeps_the_norm_and_ends_at_equal_singular_values(taus: list[Tensor]) -> None:
    torch.testing.assert_close(formulas.flattened(taus[0], 0.0), taus[0])
    values = torch.linalg.svdvals(formulas.flattened(taus[0], 1.0))
    torch.testing.assert_close(values, (taus[0].norm() / ROWS**0.5).expand(ROWS))


def test_isotropic_has_the_mean_singular_value_of_the_sum(taus: list[Tensor]) -> None:
    mean = torch.linalg.svdvals(torch.stack(taus).sum(0)).mean()
    torch.testing.assert_close(torch.linalg.svdvals(formulas.isotropic(taus)), mean.expand(ROWS))


def test_merges_in_memory_are_those_of_the_command(tmp_path: Path) -> None:
    suite = GlyphSuite.example(("digits", "latin"))
    subject = Subject(suite)
    names = [name for name, _ in ideas(subject)]
    assert len(names) == len(set(names))
    assert {name: subject.base[name].ndim for name in subject.convolutions} == {
        f"stem.{place}.weight": 4 for place in (0, 2, 4)
    }
    pymerge.merge(FLOW.config(suite, suite.tasks, 0), tmp_path / "merged", progress=False)
    merged = suite.load(tmp_path / "merged")
    state = subject.state(subject.flow | subject.averaged)
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-2, atol=1e-4)
    found = subject.measure([state])["scores"]
    assert found == pytest.approx(scores(suite, merged, suite.tasks, 0, "validation"), abs=2.5)


def test_tempered_is_what_the_op_computes(taus: list[Tensor]) -> None:
    X, base = torch.stack(taus).sum(0), torch.zeros(ROWS, COLUMNS)
    expected = TemperSpectrum(X, base, taus, 1.1).reference()
    torch.testing.assert_close(formulas.tempered(X, taus, 1.1), expected, rtol=1e-4, atol=1e-5)


def test_groups_are_some_of_the_tasks_and_rows_their_means() -> None:
    subjects = explore.groups("glyphs5", 2)
    assert [len(s.experts) for s in subjects] == [2, 2, 2, 2]
    assert len({s.suite.tasks for s in subjects}) == 4
    assert len(explore.groups("glyphs5", 0)) == 1
    measured = [{"mean": float(place), "loss": 2.0 * place} for place in range(4)]
    found = explore.together(subjects, measured)
    assert (found["mean"], found["loss"]) == (1.5, 3.0)
    assert found["scores"][", ".join(subjects[3].suite.tasks)] == 3.0
    assert explore.together(subjects[:1], measured[:1]) is measured[0]
