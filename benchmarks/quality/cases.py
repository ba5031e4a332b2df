"""The rows of the table as data: which method, with which parameters, and which one is tuned on validation examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.quality.inputs import SAMPLES, grams
from benchmarks.quality.suite import Suite, TrainingSuite

PER_TASK = "1/T"  # a parameter's value that depends on the number of tasks


@dataclass(frozen=True)
class Recipe:
    """One row. `tuned` names a parameter that takes the best value of `grid` (ascending) on validation examples.

    The search begins at `start`, one of the grid's.
    """

    name: str
    method: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    tuned: str = ""
    grid: tuple[float, ...] = ()
    start: float = 0.0

    def at(self, value: float) -> Recipe:
        """The recipe with the tuned parameter set, and nothing left to tune."""
        return Recipe(self.name, self.method, {**self.parameters, self.tuned: value})

    def config(self, suite: Suite, tasks: Sequence[str], seed: int) -> dict[str, Any]:
        """What `pymerge merge` is given; parameters of the models stand beside those of the merge."""
        if self.tuned:
            raise ValueError(f"{self.name}: {self.tuned} is not set; call at() first")
        return {
            "merge_method": self.method,
            "base_model": str(suite.base()),
            "models": [{"model": str(suite.expert(task, seed))} for task in tasks],
            "parameters": {
                name: 1 / len(tasks) if value == PER_TASK else value for name, value in self.parameters.items()
            },
        }


@dataclass(frozen=True)
class DataRecipe(Recipe):
    """A row that uses training examples of each task, by Grams of what its expert's layers read of them."""

    samples: int = SAMPLES

    def at(self, value: float) -> DataRecipe:
        return replace(self, parameters={**self.parameters, self.tuned: value}, tuned="", grid=(), start=0.0)

    def config(self, suite: Suite, tasks: Sequence[str], seed: int) -> dict[str, Any]:
        """What `pymerge merge` is given. Raises TypeError for a suite without training examples."""
        if not isinstance(suite, TrainingSuite):
            raise TypeError(f"{suite.name} has no training examples")
        found = super().config(suite, tasks, seed)
        for task, model in zip(tasks, found["models"], strict=True):
            model["parameters"] = {"grams": str(grams(suite, task, seed))}
        return found


# The exact minimiser of WUDI's loss: gradient flow for so long that no direction is left on its way.
EXACT_TIME = 1e9
# ViT-B/32's settings of SWUDI, arXiv 2606.07289.
SWUDI_CLIP = {"time": 1300.0, "rank_ratio": 0.65}
SCALES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
LAMBDAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
RATIOS = (0.0, 0.1, 0.3, 0.6, 0.8, 0.9, 0.95, 1.0)  # of RegMean's elements off the diagonal
RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# TIES and DARE keep a fifth of each task vector: the share that TIES was published with.
DENSITY = 0.2

TASK_ARITHMETIC = Recipe("task arithmetic, tuned", "task_arithmetic", tuned="weight", grid=SCALES, start=0.3)
TIES = Recipe("ties, tuned", "ties", {"weight": 1.0, "density": DENSITY}, "lambda", LAMBDAS, 1.0)
FLOW = Recipe("wudi_flow, t = 300", "wudi_flow", {"time": 300.0})
ACE = Recipe("ace, released, eps tuned", "ace", {"variant": "released"}, "eps", RIDGES, 1e-5)


def scaled(method: str, parameters: Mapping[str, Any] | None = None, grid: tuple[float, ...] = FACTORS) -> Recipe:
    """A method with the factor of its merged delta tuned."""
    return Recipe(f"{method}, scale tuned", method, parameters or {}, "scale", grid, 1.0)


def calibrated(recipe: Recipe, alpha: float | str = 1.0) -> Recipe:
    """A recipe with SVC behind it; PER_TASK is what is published for averages and sums."""
    passes = {"calibrate": "svc", "calibrate_alpha": alpha}
    return replace(recipe, name=f"{recipe.name}, calibrated", parameters={**recipe.parameters, **passes})


def boosted(recipe: Recipe) -> Recipe:
    """A recipe with Subspace-Boosting behind it, at its published share."""
    return replace(recipe, name=f"{recipe.name}, boosted", parameters={**recipe.parameters, "boost": 0.01})


def layered(recipe: Recipe) -> Recipe:
    """A recipe with ESM's factor of each layer behind it, at its published power."""
    passes = {"layer_scale": {"power": 2}}
    return replace(recipe, name=f"{recipe.name}, layers scaled", parameters={**recipe.parameters, **passes})


TSV_M = Recipe("tsv_m", "tsv_m")
AVERAGE = Recipe("task arithmetic, 1/T", "task_arithmetic", {"weight": PER_TASK})
WEIR = Recipe("weir", "weir")
TACT, DC_MERGE, RESMERGE, DOGE = (Recipe(name, name) for name in ("tact", "dc_merge", "resmerge", "doge"))
# Passes behind a method work on single tensors, so doge's density must be a share of each.
DOGE_BY_TENSOR = Recipe("doge, scope tensor", "doge", {"scope": "tensor"})
STAR, CART, LORE = (Recipe(name, name) for name in ("star", "cart", "lore"))

RECIPES = (
    Recipe("simple average", "linear", {"weight": 1.0}),
    Recipe("task arithmetic, 0.3", "task_arithmetic", {"weight": 0.3}),
    TASK_ARITHMETIC,
    TIES,
    Recipe("dare_ties, tuned", "dare_ties", {"weight": 1.0, "density": DENSITY}, "lambda", SCALES, 0.3),
    Recipe("wudi, published lr 1e-5", "wudi", {"lr": 1e-5}),
    Recipe("wudi, lr auto", "wudi", {"lr": "auto"}),
    Recipe("wudi, exact solution", "wudi_flow", {"time": EXACT_TIME}),
    FLOW,
    scaled("wudi_flow", {"time": 300.0}),
    WEIR,
    Recipe("swudi, t = 1300, 0.65", "swudi", SWUDI_CLIP),
    Recipe("swudi_a", "swudi_a"),
    scaled("swudi_a"),
    Recipe("tsv_m, tuned", "tsv_m", tuned="scale", grid=FACTORS, start=1.0),
    Recipe("iso_c, tuned", "iso_c", tuned="scale", grid=(*FACTORS, 3.0, 4.0), start=1.0),
    scaled("iso_cts", grid=(*FACTORS, 3.0, 4.0)),
    ACE,
    scaled("ace", {"variant": "released"}),
    Recipe("ace, paper, eps tuned", "ace", {"variant": "paper"}, "eps", RIDGES, 1e-5),
    TACT,
    scaled("tact"),
    DC_MERGE,
    scaled("dc_merge"),
    RESMERGE,
    scaled("resmerge"),
    DOGE,
    scaled("doge"),
    STAR,
    scaled("star", grid=(*FACTORS, 3.0, 4.0)),
    CART,
    Recipe("cart, lambda tuned", "cart", {}, "lambda", SCALES, 0.1),
    LORE,
    Recipe("lore, lambda tuned", "lore", {}, "lambda", (*FACTORS, 3.0, 4.0), 1.0),
    DataRecipe("regmean, with training data", "regmean"),
    DataRecipe("regmean, with training data, ratio tuned", "regmean", {}, "reduce_non_diagonal_ratio", RATIOS, 0.9),
    *(calibrated(recipe) for recipe in (FLOW, TSV_M, TACT, DC_MERGE, DOGE_BY_TENSOR)),
    *(calibrated(recipe, PER_TASK) for recipe in (AVERAGE, RESMERGE, STAR, CART, LORE)),
    *(boosted(recipe) for recipe in (FLOW, TSV_M, AVERAGE)),
    *(layered(recipe) for recipe in (FLOW, TSV_M, AVERAGE)),
)
FORCED = -1.0  # gamma_threshold of ace: refine always
