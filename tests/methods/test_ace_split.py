"""ACE's refined form by split deltas: X and D against explicit inverses in float64, the errors that it tells, and
the rule of `precision: auto` for what is written of it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import pymerge
from pymerge.backends.runner import Runner
from pymerge.methods.ace_split import Parts, by_rows, by_weights
from pymerge.methods.split_deltas import Scaled
from pymerge.ops.task_stats import TaskStats
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64
from tests.helpers.oracles import ace_delta
from tests.helpers.solvers import DEVICE
from tests.methods.test_precision import EXCUSED, HALVES, ordinals

EPS = 1e-5
K = 80


def with_noise(shape: tuple[int, int], tasks: int, rank: int | None, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Deltas of low rank, far above the noise of an optimiser and of 16 bits."""
    base, experts = make_weights(*shape, tasks, rank=rank, rms=2e-4, spread=1.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    noise = [1e-5 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in experts]
    base = base.to(dtype)
    return base, [(expert + more).to(dtype) for expert, more in zip(experts, noise, strict=True)]


def scaled(base: Tensor, experts: list[Tensor], released: bool) -> Scaled:
    stats = Runner("auto", DEVICE)(TaskStats(base, experts))
    weights = [1.0 / trace for trace in stats.traces.tolist()]
    divisor = float(stats.norms.mean()) if released else 1.0
    return Scaled(base, experts, stats.means, weights, [EPS * each for each in weights], divisor, released)


def exact(tasks: Scaled) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """X and D as their formulas stand, with an explicit inverse."""
    taus = [as_float64(expert) - as_float64(tasks.base) for expert in tasks.experts]
    count, size = len(taus), taus[0].shape[1]
    centred = [tau - tau.mean(axis=0) for tau in taus]
    sigmas = [weight * c.T @ c for weight, c in zip(tasks.weights, centred, strict=True)]
    regular = [sigma + ridge * np.eye(size) for sigma, ridge in zip(sigmas, tasks.ridges, strict=True)]
    prior = sum(sigmas).mean(axis=0) / tasks.divisor
    left = centred if tasks.released else taus
    X = sum(c @ s for c, s in zip(left, regular, strict=True)) @ np.linalg.inv(
        sum(regular) + np.outer(np.ones(size), prior)
    )
    average = sum(regular if tasks.released else sigmas) / count
    return X, sum(tau @ (sigma - average) for tau, sigma in zip(taus, sigmas, strict=True))


def parts_of(tasks: Scaled, rows: bool) -> Parts:
    found = (by_rows if rows else by_weights)(Runner("auto", DEVICE), tasks, K)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("shape", "tasks", "rank", "rows", "released"),
    [
        ((330, 280), 3, 8, False, True),
        ((330, 280), 3, 8, False, False),
        ((280, 400), 2, None, False, True),  # flat: nothing is left out of D
        ((700, 260), 1, 16, False, True),
        ((260, 900), 3, 8, True, True),
        ((256, 1300), 2, None, True, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_parts_and_what_they_tell_of_their_errors(
    shape: tuple[int, int], tasks: int, rank: int | None, rows: bool, released: bool, dtype: torch.dtype
) -> None:
    given = scaled(*with_noise(shape, tasks, rank, dtype), released)
    parts, (X, D) = parts_of(given, rows), exact(given)
    found = as_float64(parts.X), as_float64(parts.D)
    wrong = found[0] + found[1] - X - D
    for error in np.linalg.norm(found[0] - X), np.linalg.norm(wrong):
        assert error <= 3e-6 * np.linalg.norm(X)
        assert error <= 1.5 * parts.error + 1e-7 * np.linalg.norm(X)  # X is rounded to float32
    U, _, Vh = np.linalg.svd(X + D, full_matrices=False)
    beside = np.linalg.norm(U[:, K:].T @ wrong @ Vh[K:].T)
    assert beside <= 1.5 * parts.beside + 1e-8 * np.linalg.norm(X)


def test_a_system_without_a_factor_in_float32_is_none() -> None:
    """Deltas so large beside the ridge, in more directions than are taken out, that float32 sees no ridge."""
    base, experts = make_weights(256, 1300, 2, rank=200, rms=3.0, dtype=torch.float32)
    assert by_rows(Runner("auto", DEVICE), scaled(base, experts, True), K) is None


def near_equal(gap: float) -> tuple[Tensor, list[Tensor]]:
    """Two tasks, one half the other, of whose singular values the 90th and the 91st are this much apart, as a share.
    Their rows and columns add up to 0, so that centring and the prior change no direction."""
    generator = torch.Generator().manual_seed(3)
    U, V = (torch.randn(n, 299, generator=generator, dtype=torch.float64) for n in (400, 300))
    U, V = (torch.linalg.qr(side - side.mean(dim=0))[0] for side in (U, V))
    s = torch.linspace(2.0, 1.0, 299, dtype=torch.float64)
    s[90] = s[89] * (1.0 - gap)
    delta = (1e-2 * U * s @ V.mT).float()
    return torch.zeros(400, 300), [delta, delta / 2.0]


def check(base: Tensor, experts: list[Tensor], variant: str, out: torch.dtype) -> None:
    arrays = as_float64(base), [as_float64(expert) for expert in experts]
    expected = ace_delta(*arrays, EPS, -1.0, variant=variant)
    merge = {"device": DEVICE, "eps": EPS, "gamma_threshold": -1.0, "variant": variant}
    wide = as_float64(pymerge.merge_tensors(base, experts, "ace", dtype=torch.float64, **merge)) - arrays[0]
    assert np.linalg.norm(wide - expected) <= 5e-6 * np.linalg.norm(expected)
    if out == torch.float32:
        return
    merged = pymerge.merge_tensors(base, experts, "ace", dtype=out, **merge).cpu()
    right = torch.from_numpy(arrays[0] + expected).to(out)
    counted = np.abs(wide - expected) > EXCUSED * np.sqrt(np.square(expected).mean())
    ulps = np.abs(ordinals(merged) - ordinals(right))[counted]
    assert (ulps > 0).sum() <= expected.size / 1000
    assert not (ulps > 1).any()


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("out", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize(("shape", "tasks", "rank"), [((330, 280), 3, 8), ((260, 900), 3, 8), ((300, 600), 2, None)])
def test_outputs_are_the_float64_merge_rounded(
    shape: tuple[int, int], tasks: int, rank: int | None, out: torch.dtype, variant: str
) -> None:
    check(*with_noise(shape, tasks, rank, out), variant, out)


@pytest.mark.parametrize(("gap", "float64"), [(1e-2, "leading directions and decomposition"), (1e-7, "all")])
@pytest.mark.parametrize("out", [torch.float32, *HALVES], ids=str)
def test_equal_singular_values_at_the_cut_take_float64(
    caplog: pytest.LogCaptureFixture, gap: float, float64: str, out: torch.dtype
) -> None:
    caplog.set_level(logging.INFO, "pymerge")
    check(*near_equal(gap), "released", out)
    found = [
        record.fields["float64"] for record in caplog.records if getattr(record, "event", "") == "precision_chosen"
    ]
    assert set(found) == {float64}
