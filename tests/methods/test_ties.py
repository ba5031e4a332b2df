"""mergekit's task-vector family against the formulas in float64, and what it does at the limits of its parameters."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.backends.runner import Runner
from pymerge.common.shapes import key_of
from pymerge.config.merge_config import load_config
from pymerge.engine.torch_worker import merge_rows
from pymerge.errors import ArgumentError, ConfigError, NonFiniteError, PlanError
from pymerge.methods import METHODS
from pymerge.methods.base import Values
from pymerge.methods.masks import KeepMagnitudes
from pymerge.methods.rows import Rows
from pymerge.methods.ties import METHODS as SPARSE_METHODS
from pymerge.ops._philox import uniform_words
from pymerge.testing.cases import make_weights
from pymerge.testing.compare import as_float64
from tests.helpers.checkpoints import fine_tuned, llama, llama_config, load_output, write_config, write_model
from tests.helpers.oracles import della_probabilities, kept_magnitudes, sparse_delta

# name -> sparsifier, elects signs, normalize and rescale by default: mergekit's table.
FAMILY = {
    "ties": ("magnitude", True, True, False),
    "dare_linear": ("random", False, False, True),
    "dare_ties": ("random", True, False, True),
    "della": ("ranked", True, True, True),
    "della_linear": ("ranked", False, False, True),
    "breadcrumbs": ("outliers", False, False, False),
    "breadcrumbs_ties": ("outliers", True, False, False),
}
# Exact in float32: votes that cancel do so in the oracle, too.
WEIGHTS = [0.5, 0.875, -0.25]
DENSITY = [0.3, 0.55, 0.7]
GAMMA, EPSILON = 0.05, 0.2
# What merge_tensors calls the tensor.
NAME = "the tensor"


def expected_masks(sparsifier: str, taus: list[np.ndarray], density: list[float], seed: int = 0) -> list[np.ndarray]:
    masks = []
    for task, (tau, share) in enumerate(zip(taus, density, strict=True)):
        words = uniform_words(key_of(seed, NAME, task), 0, tau.size, torch.device("cpu")).view(tau.shape).numpy()
        if sparsifier == "magnitude":
            masks.append(kept_magnitudes(tau, 0, int(share * tau.size)))
        elif sparsifier == "outliers":
            first = min(int(GAMMA * tau.size), tau.size - int(share * tau.size))
            masks.append(kept_magnitudes(tau, first, first + int(share * tau.size)))
        elif sparsifier == "random":
            masks.append(words < np.floor(share * 2.0**32))
        else:
            masks.append(words < della_probabilities(tau, share, EPSILON) * 2.0**32)
    return masks


def extra(method: str) -> dict[str, Any]:
    return {"ranked": {"epsilon": EPSILON}, "outliers": {"gamma": GAMMA}}.get(FAMILY[method][0], {})


def merged_delta(base: Tensor, experts: list[Tensor], method: str, **parameters: Any) -> np.ndarray:
    merged = pymerge.merge_tensors(base, experts, method, dtype=torch.float64, **parameters)
    return as_float64(merged) - as_float64(base)


def test_the_family_is_mergekits() -> None:
    assert [method.name for method in SPARSE_METHODS] == list(FAMILY)
    for name, (_, _, normalize, rescale) in FAMILY.items():
        defaults = METHODS[name].defaults(2)
        assert (defaults.merge["normalize"], defaults.merge["rescale"]) == (normalize, rescale)
        assert (defaults.merge["lambda"], defaults.model["density"]) == (1.0, (1.0, 1.0))


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("shape", [(40, 96), (1, 200), (300,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_methods_compute_the_formulas(method: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, experts = make_weights(*(shape if len(shape) == 2 else (1, *shape)), 3, dtype=dtype)
    base, experts = base.view(shape), [expert.view(shape) for expert in experts]
    taus = [(expert.float() - base.float()).double().numpy() for expert in experts]
    sparsifier, elect, *_ = FAMILY[method]
    masks = expected_masks(sparsifier, taus, DENSITY)
    for normalize, rescale, scale in itertools.product((False, True), (False, True), (1.0, 0.7)):
        options = {"normalize": normalize, "rescale": rescale}
        expected = sparse_delta(taus, masks, WEIGHTS, elect=elect, scale=scale, **options)
        given = {"weight": WEIGHTS, "density": DENSITY, "lambda_": scale, **options, **extra(method)}
        found = merged_delta(base, experts, method, **given)
        # Roundings of float32 sums, and of W_0 + X, whose size is that of W_0.
        tolerance = 1e-6 * np.abs(expected).max() + 1e-6 * as_float64(base).max()
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
        assert np.abs(expected).max() > 100 * tolerance or np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("method", FAMILY)
def test_density_1_keeps_everything_and_0_nothing(method: str) -> None:
    base, experts = make_weights(30, 40, 3, dtype=torch.bfloat16)
    elect, normalize = FAMILY[method][1:3]
    taus = [as_float64(expert) - as_float64(base) for expert in experts]
    everything = [np.ones((30, 40), dtype=bool)] * 3
    expected = sparse_delta(taus, everything, WEIGHTS, elect=elect, normalize=normalize)
    np.testing.assert_allclose(merged_delta(base, experts, method, weight=WEIGHTS), expected, rtol=0, atol=1e-7)
    nothing = pymerge.merge_tensors(base, experts, method, weight=WEIGHTS, density=0.0)
    torch.testing.assert_close(nothing, base, rtol=0, atol=0)
    # One of them whole, one gone: what is left is the second alone.
    some = merged_delta(base, experts, method, weight=1.0, density=[0.0, 1.0, 0.0])
    alone = merged_delta(base, experts[1:2], method, weight=1.0)
    share = 3.0 if normalize and not elect else 1.0
    np.testing.assert_allclose(some, alone / share, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (1, 1), (), (1,), (2, 3, 4)], ids=str)
def test_small_tensors(method: str, shape: tuple[int, ...]) -> None:
    base = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    same = pymerge.merge_tensors(base, [base.clone()] * 3, method, density=0.5)
    torch.testing.assert_close(same, base, rtol=0, atol=0)
    assert pymerge.merge_tensors(base, [base * 2] * 3, method, density=0.5).shape == shape


def test_ties_keeps_at_least_one_element() -> None:
    base, expert = torch.zeros(3), torch.tensor([1.0, -4.0, 2.0])
    assert pymerge.merge_tensors(base, [expert], "ties", density=0.1).tolist() == [0.0, -4.0, 0.0]


def test_breadcrumbs_that_drop_no_outlier_are_kept_unless_mergekit_is_followed() -> None:
    base, expert = torch.zeros(10), torch.arange(1.0, 11.0)
    kept = pymerge.merge_tensors(base, [expert], "breadcrumbs", density=0.3)
    assert kept.tolist() == [0.0] * 7 + [8.0, 9.0, 10.0]
    zeroed = pymerge.merge_tensors(base, [expert], "breadcrumbs", density=0.3, compat="mergekit")
    assert zeroed.tolist() == [0.0] * 10
    for compat in ("none", "mergekit"):
        dropped = pymerge.merge_tensors(base, [expert], "breadcrumbs", density=0.3, gamma=0.2, compat=compat)
        assert dropped.tolist() == [0.0] * 5 + [6.0, 7.0, 8.0, 0.0, 0.0]
        # More outliers than the density leaves room for: the density is kept.
        limited = pymerge.merge_tensors(base, [expert], "breadcrumbs", density=0.8, gamma=0.9, compat=compat)
        assert limited.tolist() == [*map(float, range(1, 9)), 0.0, 0.0]


def test_parameters_out_of_their_range_are_errors() -> None:
    base, experts = make_weights(6, 8, 2)
    for parameters, message in (
        ({"density": 1.5}, "'density' is 1.5; it must be at most 1"),
        ({"density": -0.1}, "'density' is -0.1; it must be at least 0"),
        ({"density": 0.9, "epsilon": 0.15}, "density 0.9 with epsilon 0.15 .* choose epsilon below 0.1"),
        ({"density": 0.2, "epsilon": 0.2}, "density 0.2 with epsilon 0.2 .* choose epsilon below 0.2"),
        ({"density": 0.5, "epsilon": -0.1}, "'epsilon' is -0.1; it must be at least 0"),
        ({"density": 0.5, "random_seed": -1}, "'random_seed' is -1; it must be at least 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            pymerge.merge_tensors(base, experts, "della", **parameters)
    with pytest.raises(ArgumentError, match=r"'gamma' is 1\.1; it must be at most 1"):
        pymerge.merge_tensors(base, experts, "breadcrumbs", density=0.5, gamma=1.1)
    with pytest.raises(ArgumentError, match="add up to 0 and cannot be normalised"):
        pymerge.merge_tensors(base, experts, "dare_linear", weight=[1.0, -1.0], density=0.5, normalize=True)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "della", "breadcrumbs_ties"])
def test_nan_is_found_and_stays_where_it_is_allowed(method: str) -> None:
    base, experts = make_weights(6, 8, 2)
    experts[1][2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="the tensor: expert 1 has 1 values that are NaN"):
        pymerge.merge_tensors(base, experts, method, density=0.5)
    action = METHODS[method].action("w", True, _values(method), 2)
    assert action.shows_nonfinite
    for backend in ("reference", "native"):
        assert torch.isnan(merge_rows(action, Runner(backend), Rows(base, experts, "F32"))[2, 3])


def _values(method: str) -> Values:
    defaults = METHODS[method].defaults(2)
    return Values(defaults.merge, {**defaults.model, "density": (0.5, 0.5)})


def test_seeds_and_names_draw_other_masks() -> None:
    base, experts = make_weights(40, 40, 2)
    first, again, other = (
        pymerge.merge_tensors(base, experts, "dare_linear", density=0.5, rescale=False, random_seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert float((first != other).float().mean()) == pytest.approx(0.75, abs=0.06)  # of two flags
    states = pymerge.merge_state_dicts(
        {"a": base, "b": base}, [{"a": e, "b": e} for e in experts], "dare_ties", density=0.5
    )
    assert not torch.equal(states["a"], states["b"])


def test_float64_is_merged_in_float64() -> None:
    base, experts = make_weights(20, 30, 3, dtype=torch.float64)
    taus = [as_float64(expert) - as_float64(base) for expert in experts]
    for method in ("ties", "della_linear", "breadcrumbs_ties"):
        sparsifier, elect, normalize, rescale = FAMILY[method]
        masks = expected_masks(sparsifier, taus, [0.5] * 3)
        expected = sparse_delta(taus, masks, [1.0] * 3, elect=elect, normalize=normalize, rescale=rescale)
        found = merged_delta(base, experts, method, density=0.5, **extra(method))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14 * np.abs(as_float64(base)).max() * 10)


@pytest.mark.parametrize("native", [False, True])
def test_plans_count_scratch_by_bits(native: bool) -> None:
    """A bit for each element and task, and what does not grow with the tensor."""
    action = KeepMagnitudes((1.0,) * 3, True, True, False, 1.0, (0.0,) * 3, (0.5,) * 3, False, False)
    small, large = (action.scratch((rows, 1024), 3, native) for rows in (1024, 9216))
    assert large - small == 3 * 8192 * 1024 // 8


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts, one tensor of which is large enough to be cut into chunks elsewhere."""
    folder = tmp_path_factory.mktemp("models")
    base = llama(hidden=48, inner=64, vocabulary=120, blocks=1)
    config = llama_config(base)
    for name, tensors in (("base", base), ("e0", fine_tuned(base, 0)), ("e1", fine_tuned(base, 1))):
        write_model(folder / name, tensors, config=config)
    return folder


@pytest.mark.parametrize("method", FAMILY)
def test_whole_merges_are_those_of_their_tensors(models: Path, method: str, tmp_path: Path) -> None:
    parameters = {"weight": 0.6, "density": 0.5, "int8_mask": True}
    report = pymerge.merge(write_config(models, method, **parameters), tmp_path / "out", progress=False)
    found = load_output(tmp_path / "out")
    base, *experts = (load_output(models / name) for name in ("base", "e0", "e1"))
    parameters.pop("int8_mask")
    for name, tensor in pymerge.merge_state_dicts(base, experts, method, **parameters).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    assert any("'int8_mask' has no effect" in warning for warning in report.warnings)


def test_the_seed_is_a_key_of_the_config(models: Path) -> None:
    text = (write_config(models, "dare_ties", weight=0.6, density=0.5)).read_text()
    config = load_config(text + "random_seed: 7\n", directory=models)
    inside = load_config(text.replace("parameters:\n", "parameters:\n  random_seed: 7\n", 1), directory=models)
    assert config.parameters["random_seed"] == inside.parameters["random_seed"]
    assert "random_seed" not in load_config(text + "random_seed:\n", directory=models).parameters
    with pytest.raises(ConfigError, match="'random_seed' is -1; it must be at least 0"):
        load_config(text + "random_seed: -1\n", directory=models)
    with pytest.raises(ConfigError, match="random_seed stands under 'parameters', too"):
        load_config(text.replace("parameters:\n", "parameters:\n  random_seed: 1\n", 1) + "random_seed: 7\n")
    (warning,) = load_config(text.replace("dare_ties", "ties") + "random_seed: 7\n", directory=models).warnings
    assert "random_seed: 'ties' draws no random numbers; it has no effect" in warning


def test_plans_name_what_epsilon_allows(models: Path) -> None:
    with pytest.raises(PlanError, match=r"density 0\.95 with epsilon 0\.15 .* choose epsilon below 0\.05"):
        pymerge.plan(write_config(models, "della", weight=0.6, density=0.95))
