"""Solvers of layers that are merged by what all of them tell together, found when the first one is merged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import product
from weakref import WeakKeyDictionary

from pymerge.adapters.low_rank import low_rank_of
from pymerge.checkpoint.reader import Reader
from pymerge.methods.actions import InCore, Run, Solve
from pymerge.methods.core.factors import Factors, Tasks
from pymerge.planner.steps import Layers, Step

# A matrix of a model: the name of its tensor, its number in a stack, and that of the part of a weight.
Place = tuple[str, int, int]


class Together:
    """Asks the factors of all `Layers` once, by the first thread that needs to know, on that thread alone.

    Its callers are in `one_blas_thread`.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._found: WeakKeyDictionary[Layers, Future[Mapping[Place, Solve]]] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def solver(self, reader: Reader, step: Step, matrix: int, part: int) -> Solve:
        """The solver of one matrix of a step."""
        layers, solve = step.layers, core_of(step).solve
        if layers is None:
            return solve
        with self._lock:
            found = self._found.get(layers)
            mine = found is None
            if found is None:
                found = self._found[layers] = Future()
        if mine:
            try:
                found.set_result(self._ask(reader, layers, solve))
            except BaseException as error:
                with self._lock:
                    self._found.pop(layers, None)  # it is asked again when there is memory
                found.set_exception(error)
        return found.result()[step.name, matrix, part]

    def _ask(self, reader: Reader, layers: Layers, solve: Solve) -> dict[Place, Solve]:
        matrices = [(step, *place) for step in layers.steps for place in _matrices(step)]
        loads: list[Callable[[], Sequence[Factors]]] = [
            partial(factors_of_all, reader, step, matrix, part) for step, matrix, part in matrices
        ]
        solvers = solve.together(self._run, loads, len(layers.steps[0].experts))
        return {(step.name, matrix, part): each for (step, matrix, part), each in zip(matrices, solvers, strict=True)}


def _matrices(step: Step) -> Iterator[tuple[int, int]]:
    """Numbers of the matrices of a stack, and of the parts that are solved by themselves."""
    return product(range(step.shape[0] if step.role.stacked else 1), range(step.role.parts))


def factors_of_all(reader: Reader, step: Step, matrix: int, part: int) -> Tasks:
    """tau of all experts of a step, d_out x d_in: one adapter's factors after another, joined as they are read."""
    (d_out, d_in), role = core_of(step).shape, step.role
    found = [low_rank_of(entry) for entry in step.experts]
    double = not all(each is None or each.exact_in_single for each in found)
    ranks = [0 if each is None else each.rank_of(matrix) for each in found]
    tasks = Tasks.empty((d_out, d_in), ranks, double)
    for task, each in enumerate(found):
        if each is not None:
            left, right = each.factors(reader.read_bytes, matrix, double=False)
            B, A = (right.T, left.T) if role.in_axis == 0 else (left, right)
            tasks.put(task, B[role.part(part, len(B))], A)
    return tasks


def core_of(step: Step) -> InCore:
    """The action of a step that is solved by its factors."""
    assert isinstance(step.action, InCore)
    return step.action
