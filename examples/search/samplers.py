"""Who proposes coefficients: pycma or Optuna, both asked for a point and told its score, higher being better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

_POPULATION = 10


class Sampler(Protocol):
    """Asked and told by turns."""

    def ask(self) -> list[float]:
        """The next point."""

    def tell(self, score: float) -> None:
        """The score of the point that was asked for last."""


class Cma:
    """CMA-ES of pycma, whose generations are given out point by point."""

    def __init__(self, start: Sequence[float], spread: float, seed: int) -> None:
        import cma

        options = {"seed": seed + 1, "popsize": _POPULATION, "verbose": -9}  # it takes the time for a seed of 0
        self._strategy = cma.CMAEvolutionStrategy(list(start), spread, options)
        self._points: list[Sequence[float]] = []
        self._costs: list[float] = []

    def ask(self) -> list[float]:
        if len(self._costs) == len(self._points):
            if self._points:
                self._strategy.tell(self._points, self._costs)
            self._points, self._costs = self._strategy.ask(), []
        return [float(each) for each in self._points[len(self._costs)]]

    def tell(self, score: float) -> None:
        self._costs.append(-score)


class Optuna:
    """CMA-ES of Optuna, one study in memory."""

    def __init__(self, start: Sequence[float], spread: float, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        named = {f"x{number}": value for number, value in enumerate(start)}
        sampler = optuna.samplers.CmaEsSampler(x0=named, sigma0=spread, seed=seed, popsize=_POPULATION)
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._names = list(named)

    def ask(self) -> list[float]:
        self._trial = self._study.ask()
        return [self._trial.suggest_float(name, -1.0, 2.0) for name in self._names]

    def tell(self, score: float) -> None:
        self._study.tell(self._trial, score)


SAMPLERS: Mapping[str, Callable[[Sequence[float], float, int], Sampler]] = {"cma": Cma, "optuna": Optuna}
