"""MAP on metrics that are quadratics by construction: what it finds can be computed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

import pymerge
from pymerge.errors import ArgumentError
from pymerge.search.pareto import reference_points, undominated
from pymerge.search.surrogate import ACTIVATIONS, features, fit, least_points, predict

Evaluate = Callable[[Mapping[str, Tensor]], list[float]]


def toy(tasks: int, seed: int = 0) -> tuple[pymerge.Merger, Evaluate, np.ndarray]:
    """Models of one float64 weight, squared distances to a target each, and these as quadratics in the coefficients."""
    generator = torch.Generator().manual_seed(seed)
    base, *deltas = torch.randn(tasks + 1, 6, 5, generator=generator, dtype=torch.float64)
    targets = [base + delta + 0.1 * torch.randn(6, 5, generator=generator, dtype=torch.float64) for delta in deltas]
    merger = pymerge.Merger({"w": base}, [{"w": base + delta} for delta in deltas], "task_arithmetic")

    def evaluate(merged: Mapping[str, Tensor]) -> list[float]:
        return [float(((merged["w"] - target) ** 2).sum()) for target in targets]

    vectors = torch.stack([delta.flatten() for delta in deltas])
    gram = (vectors @ vectors.T).numpy()
    rows = []
    for target in targets:
        rest = (base - target).flatten()
        first, second = np.triu_indices(tasks, 1)
        rows.append([*np.diag(gram), *2 * gram[first, second], *(2 * vectors @ rest).tolist(), float(rest @ rest)])
    return merger, evaluate, np.array(rows)


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_quadratics_are_found_as_they_are_and_metrics_of_the_front_are_those_of_its_merges(tasks: int) -> None:
    merger, evaluate, expected = toy(tasks)
    front = pymerge.search.map(merger, evaluate, seed=3)
    np.testing.assert_allclose(front.surrogate, expected, rtol=1e-6, atol=1e-6)
    assert front.evaluations == len(front.samples) == (tasks + 1) * (tasks + 2)
    assert front.coefficients.shape[1] == front.metrics.shape[1] == tasks
    again = [evaluate(merger.merge(weight=row.tolist())) for row in front.coefficients[:5]]
    np.testing.assert_allclose(front.metrics[:5], again, rtol=1e-6, atol=1e-6)
    assert len(front.coefficients) >= (20 if tasks > 1 else 1)


def test_the_front_of_two_distances_is_the_way_between_their_minima() -> None:
    merger, evaluate, quadratics = toy(2)
    front = pymerge.search.map(merger, evaluate)
    for preference in ([1, 0], [0, 1], [1, 1], [1, 3]):
        weights = np.array(preference) / np.linalg.norm(preference)
        (a, b, ab, p, q, _) = weights @ quadratics  # a x^2 + b y^2 + ab x y + p x + q y + c
        minimum = np.linalg.solve([[2 * a, ab], [ab, 2 * b]], [-p, -q])
        if not ((minimum >= 0) & (minimum <= 1)).all():
            continue
        np.testing.assert_allclose(front.best(preference), minimum, atol=0.02)
    assert undominated(front.metrics).all()


def test_higher_metrics_are_better_where_that_is_asked_for() -> None:
    merger, evaluate, _ = toy(2)
    lower = pymerge.search.map(merger, evaluate, seed=5)
    higher = pymerge.search.map(
        merger, lambda merged: [-each for each in evaluate(merged)], direction="maximize", seed=5
    )
    np.testing.assert_allclose(lower.coefficients, higher.coefficients, atol=1e-5)
    np.testing.assert_allclose(lower.best([1, 2]), higher.best([1, 2]), atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_fitted(activation: str) -> None:
    rng = np.random.default_rng(0)
    coefficients = rng.uniform(size=(24, 3))
    true = rng.normal(size=(2, least_points(3)))
    metrics = predict(true, coefficients, activation)
    np.testing.assert_allclose(fit(coefficients, metrics, activation), true, rtol=1e-4, atol=1e-4)


def test_features_are_in_the_order_of_the_paper() -> None:
    assert features(np.array([[2.0, 3.0, 5.0]])).tolist() == [[4, 9, 25, 6, 10, 15, 2, 3, 5, 1]]


def test_nested_searches_join_models_two_by_two() -> None:
    merger, evaluate, _ = toy(5)
    front = pymerge.search.map(merger, evaluate, nested=True, points=8)
    assert front.evaluations == 5 + 8 * 4
    assert front.parts.shape == (2, 5)
    assert ((front.parts > 0).sum(axis=0) <= 1).all(), "each model is in one of the two merges"
    merged = evaluate(merger.merge(weight=front.best().tolist()))
    assert sum(merged) < min(sum(evaluate(merger.merge(weight=unit))) for unit in np.eye(5).tolist())
    np.testing.assert_allclose(
        front.metrics[0], evaluate(merger.merge(weight=front.coefficients[0].tolist())), rtol=1e-6
    )


def test_a_seed_gives_the_same_front_and_leaves_the_global_generators_as_they_were() -> None:
    merger, evaluate, _ = toy(2)
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.random()
    random.seed(1)
    np.random.seed(1)
    first = pymerge.search.map(merger, evaluate, seed=7)
    assert (random.random(), np.random.random()) == expected
    second = pymerge.search.map(merger, evaluate, seed=7)
    assert np.array_equal(first.coefficients, second.coefficients)
    assert not np.array_equal(first.samples, pymerge.search.map(merger, evaluate, seed=8).samples)


@pytest.mark.parametrize("count", range(1, 21))
def test_reference_points_are_directions_and_neither_few_nor_many(count: int) -> None:
    points = reference_points(count)
    assert points.shape[1] == count
    assert (points >= 0).all()
    assert count == 1 or max(20, count) <= len(points) <= 250


def test_what_is_dominated_is_found() -> None:
    costs = np.array([[1.0, 3], [2, 2], [3, 1], [2, 3], [3, 3], [1, 3]])
    assert undominated(costs).tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"points": 5}, "points=5: a quadratic in 2 coefficients has 6 of its own.*give points=6 or more"),
        ({"activation": "relu"}, "activation='relu' is not known; give one of identity, sigmoid, softplus"),
        ({"direction": "up"}, "direction='up'"),
        ({"points": "many"}, "points='many': .*give points=6 or more"),
        ({"bounds": (1.0, 0.0)}, r"bounds=\(1.0, 0.0\)"),
        ({"bounds": "wide"}, "bounds='wide': give two numbers"),
        ({"seed": None}, "seed=None: give a whole number from 0 on"),
        ({"seed": -1}, "seed=-1"),
        ({"preference": "first"}, "preference='first': give a weight for each task"),
        ({"preference": [1.0]}, "a weight for each of 2 tasks"),
        ({"preference": [1.0, -1.0]}, "weights of 0 or more"),
        ({"activation": "sigmoid"}, "sigmoid takes values of 0 to 1"),
    ],
)
def test_bad_arguments(given: dict, said: str) -> None:
    merger, evaluate, _ = toy(2)
    with pytest.raises(ArgumentError, match=said):
        pymerge.search.map(merger, evaluate, **given)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ([1.0, float("nan")], "finite"),
        ([], "a sequence of numbers, one for each task"),
        ("text", "a number for each task"),
        (3.0, "a sequence of numbers, one for each task"),
    ],
)
def test_bad_metrics(metrics: object, said: str) -> None:
    merger, _, _ = toy(2)
    with pytest.raises(ArgumentError, match=rf"evaluate at the coefficients \[1.0, 0.0\].*{said}"):
        pymerge.search.map(merger, lambda merged: metrics)  # type: ignore[arg-type, return-value]


def test_many_merges_are_a_list_of_mappings() -> None:
    merger, _, _ = toy(2)
    for wrong in ({"weight": 1.0}, [1.0], "weight"):
        with pytest.raises(ArgumentError, match="pass a list of mappings, one for each merge"):
            merger.merge_many(wrong)


def test_metrics_that_change_their_number_and_methods_without_weights() -> None:
    merger, evaluate, _ = toy(2)
    numbers = iter(range(100))
    with pytest.raises(ArgumentError, match="gave 3 numbers, and 2 before"):
        pymerge.search.map(merger, lambda merged: [0.0] * (2 + (next(numbers) > 3)))
    with pytest.raises(ArgumentError, match="nested=True takes one task for each model"):
        pymerge.search.map(toy(3)[0], lambda merged: [0.0], nested=True)
    ones = {"w": torch.ones(4, 4)}
    with pytest.raises(ArgumentError, match="the models of tsv_m have no weights"):
        pymerge.search.map(pymerge.Merger(ones, [ones, ones], "tsv_m"), evaluate)
