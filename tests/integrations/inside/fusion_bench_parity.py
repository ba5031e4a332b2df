"""FusionBench's own functions as oracles of methods; run by tests/integrations/test_fusion_bench.py, with FusionBench
installed. Theirs compute in float32, but for KnOTS's decomposition."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.knots.knots_utils import subspace_alignment
from fusion_bench.method.singular_value_calibration.utils import (
    subspace_consistency_spectral_calibration,
    subspace_consistency_spectral_calibration_accelerated,
)
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging
from fusion_bench.method.wudi.wudi import wudi_merging
from fusion_bench.modelpool import BaseModelPool
from torch import Tensor

import pymerge

CPU = torch.device("cpu")
SHAPES = [(24, 18), (18, 24), (20, 20)]
TASKS = 3


def models(shape: tuple[int, int], size: float = 1e-2) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A base, experts, and the task vectors that FusionBench would have of them."""
    generator = torch.Generator().manual_seed(sum(shape))
    base = torch.randn(shape, generator=generator)
    experts = [base + size * torch.randn(shape, generator=generator) for _ in range(TASKS)]
    return base, experts, [expert - base for expert in experts]


def alike(found: Tensor, base: Tensor, delta: Tensor, within: float) -> None:
    """The difference as a share of what the merge moves, beside the rounding of W_0 + X to float32."""
    wanted = base.double() + delta.detach().double()
    off = (found.double() - wanted).norm() / (wanted - base.double()).norm()
    assert off <= within


@pytest.mark.parametrize("shape", SHAPES)
def test_wudi(shape: tuple[int, int]) -> None:
    base, experts, taus = models(shape)
    theirs = wudi_merging([{"w.weight": tau} for tau in taus], accelerator=CPU, iter_num=50)["w.weight"]
    alike(pymerge.merge_tensors(base, experts, "wudi", iterations=50, lr=1e-5), base, theirs, 2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("method", "theirs", "more"),
    [
        ("tsv_m", compute_and_sum_svd_mem_reduction, {}),
        ("iso_c", iso_c, {}),
        ("iso_cts", iso_cts, {"common_space_fraction": 0.8}),
        ("iso_cts", iso_cts, {"common_space_fraction": 0.5}),
    ],
)
def test_singular_vectors(shape: tuple[int, int], method: str, theirs: Any, more: dict[str, float]) -> None:
    base, experts, taus = models(shape)
    delta = theirs([{"w.weight": tau} for tau in taus], accelerator=CPU, **more)["w.weight"]
    alike(pymerge.merge_tensors(base, experts, method, **more), base, delta, 5e-5)


def kept(density: float, elements: int) -> float:
    """The density by which we keep what FusionBench keeps, which is one element more."""
    return (int(elements * density) + 1.5) / elements


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("merge_func", "normalize"), [("sum", False), ("mean", True)])
def test_ties(shape: tuple[int, int], merge_func: str, normalize: bool) -> None:
    base, experts, taus = models(shape)
    flat = ties_merging(torch.stack([tau.flatten() for tau in taus]), reset_thresh=0.3, merge_func=merge_func)
    density = kept(0.3, base.numel())
    ours = pymerge.merge_tensors(base, experts, "ties", weight=1.0, density=density, normalize=normalize)
    alike(ours, base, flat.view(shape), 2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_knots(shape: tuple[int, int]) -> None:
    """FusionBench has the alignment, and no method that goes on from there; its TIES does."""
    base, experts, taus = models(shape)
    left, values, parts = subspace_alignment([tau.double() for tau in taus])
    aligned = torch.stack([(values[:, None] * part).flatten() for part in parts])
    merged = ties_merging(aligned, reset_thresh=0.3, merge_func="mean").view(len(values), shape[1])
    density = kept(0.3, aligned.shape[1])
    alike(pymerge.merge_tensors(base, experts, "knots", density=density), base, left @ merged, 2e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [1.0, 0.1])
@pytest.mark.parametrize("method", ["task_arithmetic", "wudi", "tsv_m"])
def test_svc(shape: tuple[int, int], alpha: float, method: str) -> None:
    base, experts, _ = models(shape)
    merged = pymerge.merge_tensors(base, experts, method, dtype=torch.float64)
    ours = pymerge.merge_tensors(base, experts, method, calibrate="svc", calibrate_alpha=alpha, dtype=torch.float64)
    wide = [base.double(), [expert.double() for expert in experts], merged]
    for theirs in (
        subspace_consistency_spectral_calibration,
        subspace_consistency_spectral_calibration_accelerated,
    ):
        alike(ours, base, theirs(*wide, alpha=alpha, accelerator=CPU) - base.double(), 1e-6)


class Descent(DOGE_TA_Algorithm):
    """FusionBench's DOGE on state dicts, without its pool of models and its accelerator."""

    device = CPU
    fabric = SimpleNamespace(backward=lambda loss: loss.backward())

    def __init__(self, base: dict[str, Tensor], taus: list[dict[str, Tensor]], K: float) -> None:
        super().__init__(subspace=6, K=K, lamda=0.07)
        self._base, self._taus = base, taus

    def profile(self, name: str) -> AbstractContextManager[None]:
        return nullcontext()

    def print_profile_summary(self) -> None:
        """Nothing has been timed."""

    def compute_task_vectors(self, modelpool: Any, pretrained_model: Any) -> list[dict[str, Tensor]]:
        return self._taus


class Pool(BaseModelPool):
    """The base alone, as a module that takes a state dict and keeps it."""

    def __init__(self, base: dict[str, Tensor]) -> None:
        self.merged: dict[str, Tensor] = {}
        self._base = base

    def load_model(self, name: str) -> Any:
        return SimpleNamespace(state_dict=lambda keep_vars: self._base, load_state_dict=self.merged.update)


@pytest.mark.parametrize("density", [0.3, 0.6])
def test_doge(monkeypatch: pytest.MonkeyPatch, density: float) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)  # it asks, whether there is CUDA or not
    both = [models(shape, 1e-3) for shape in SHAPES[:2]]
    names = [f"encoder.layers.{number}.mlp.fc1.weight" for number in range(2)]
    base = {name: each[0] for name, each in zip(names, both, strict=True)}
    experts = [{name: each[1][t] for name, each in zip(names, both, strict=True)} for t in range(TASKS)]
    pool = Pool(base)
    Descent(base, [{name: expert[name] - base[name] for name in base} for expert in experts], density).run(pool)
    ours = pymerge.merge_state_dicts(base, experts, "doge", density=density)
    for name in names:
        alike(ours[name], base[name], pool.merged[name] - base[name], 5e-5)
