"""Rows of arrays give what rows of tensors give with the C++ backend, bit for bit, for every action that takes both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pymerge.backends.runner import Runner
from pymerge.common.arrays import Array, ArrayLike, as_tensor, compute_code
from pymerge.common.dtypes import code_of
from pymerge.methods import METHODS
from pymerge.methods.actions import Action, Combine, Elementwise
from pymerge.methods.base import Values
from pymerge.methods.reduce import Reduce, merge_whole
from pymerge.methods.rows import Rows, Vectors
from pymerge.testing.compare import assert_same

SHAPES = [(), (1,), (77,), (33, 65), (64, 128), (3, 5, 7), (0, 4)]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
WITH_DOUBLE = [torch.bfloat16, torch.float64, torch.float32]
SPARSE = {"weight": 0.6, "density": 0.4}
# Method, number of models, parameters.
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("linear", 3, {"weight": 0.3}),
    ("task_arithmetic", 3, {"weight": 0.3}),
    ("ties", 3, {"weight": 0.6}),
    ("ties", 3, SPARSE),
    ("ties", 5, {**SPARSE, "rescale": True}),
    ("breadcrumbs", 2, {**SPARSE, "gamma": 0.1}),
    ("breadcrumbs_ties", 2, {**SPARSE, "gamma": 0.1, "rescale": True}),
    ("dare_linear", 2, {**SPARSE, "rescale": False}),
    ("dare_ties", 2, SPARSE),
    ("della", 2, SPARSE),
    ("slerp", 1, {"t": 0.3}),
    ("nuslerp", 2, {"weight": 0.4}),
    ("multislerp", 2, {"weight": 0.4}),
    ("karcher", 2, {}),
    ("model_stock", 2, {}),
    ("nearswap", 1, {"t": 0.01}),
    ("ram", 3, {"epsilon": 1e-3}),
    ("ramplus_tl", 3, {"epsilon": 1e-3}),
    ("sce", 3, {}),
    ("sce", 3, {"select_topk": 0.4}),
    ("arcee_fusion", 1, {}),
]


def action_of(method: str, models: int, parameters: dict[str, Any]) -> Action:
    found = METHODS[method]
    merge, model = dict(found.defaults(models).merge), dict(found.defaults(models).model)
    for name, value in parameters.items():
        if name in merge:
            merge[name] = value
        else:
            model[name] = (value,) * models
    return found.action("w", True, Values(merge, model), models)


def tensors(shape: tuple[int, ...], dtypes: Sequence[torch.dtype], models: int) -> tuple[Tensor, list[Tensor]]:
    """A base and models with few magnitudes of the deltas, of these dtypes in turn."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator)
    moved = [base + torch.randint(-3, 4, shape, generator=generator) / 8 for _ in range(models)]
    return base.to(dtypes[0]), [each.to(dtypes[(i + 1) % len(dtypes)]) for i, each in enumerate(moved)]


def merged(action: Action, run: Runner, rows: Rows) -> ArrayLike:
    if isinstance(action, (Combine, Elementwise)):
        return run(action.op(rows))
    assert isinstance(action, Reduce)
    return merge_whole(action, run, rows)


def in_pieces(action: Reduce, run: Runner, pieces: list[Rows]) -> list[ArrayLike]:
    """Every pass over all pieces, and then the merge, as workers do it."""
    elements = sum(rows.numel for rows in pieces)
    columns = pieces[0].shape[1:]
    shape = (elements // max(1, int(np.prod(columns))), *columns) if pieces[0].shape else ()
    action = action.on(compute_code(pieces[0].base, *pieces[0].experts))
    state = action.start(shape, len(pieces[0].experts))
    for _ in range(state.passes):
        for rows in pieces:
            state.add(rows.first, state.map(run, rows))
        state.end_pass()
    return [state.merge(run, rows) for rows in pieces]


@pytest.mark.parametrize("dtypes", [*[[dtype] for dtype in WITH_DOUBLE], FLOATS, WITH_DOUBLE], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_arrays_and_tensors(shape: tuple[int, ...], dtypes: list[torch.dtype]) -> None:
    for method, models, parameters in CASES:
        action, run = action_of(method, models, parameters), Runner("native")
        base, experts = tensors(shape, dtypes, models)
        for out_dtype in (base.dtype, torch.float32):
            code = code_of(out_dtype)
            expected = as_tensor(merged(action, run, Rows(base, experts, code)))
            assert expected.dtype == out_dtype
            arrays = Array.of(base), [Array.of(expert) for expert in experts]
            room = Array.mapped(expected.nbytes).at(0, code, tuple(shape))
            found = merged(action, run, Rows(*arrays, code))
            assert isinstance(found, Array)
            label = f"{method} {parameters} {out_dtype}"
            assert_same(label, found.tensor(), expected)
            assert merged(action, run, Rows(*arrays, code, out=room)) is room
            assert_same(label, room.tensor(), expected)


@pytest.mark.parametrize("dtypes", [FLOATS, [torch.float64], WITH_DOUBLE], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if isinstance(action_of(*case), Reduce)], ids=str)
def test_pieces_of_arrays_and_tensors(case: tuple[str, int, dict[str, Any]], dtypes: list[torch.dtype]) -> None:
    """Where ranks and sums are of the whole tensor, it is merged the same in pieces."""
    method, models, _ = case
    action, run = action_of(*case), Runner("native")
    assert isinstance(action, Reduce)
    base, experts = tensors((64, 96), dtypes, models)
    whole = Rows(base, experts, "F32")
    arrays = Rows(Array.of(base), [Array.of(expert) for expert in experts], "F32")
    found = []
    for rows in (whole, arrays):
        pieces = [rows.cut(*bounds) for bounds in ((0, 2), (2, 34), (34, 64))]
        found.append(torch.cat([as_tensor(each) for each in in_pieces(action, run, pieces)]))
    assert_same(method, found[1], found[0])
    at_once = as_tensor(merged(action, run, whole))
    if method in ("slerp", "nuslerp", "multislerp", "karcher", "model_stock", "sce", "della"):
        # Sums in float64 are added up in another order; ranks of della are those of a row.
        torch.testing.assert_close(found[0], at_once, rtol=1e-6, atol=1e-6)
    else:
        assert_same(method, found[0], at_once)


def test_pieces_know_where_they_lie() -> None:
    base, experts = tensors((6, 4), FLOATS, 2)
    for rows in (Rows(base, experts, "F32"), Rows(Array.of(base), [Array.of(each) for each in experts], "F32")):
        piece = rows.cut(1, 5).cut(2, 4)
        assert (piece.first, piece.row, piece.shape, piece.numel) == (12, 3, (2, 4), 8)
        assert_same("base", as_tensor(piece.base), base[3:5])
        for found, expert in zip(piece.experts, experts, strict=True):
            assert_same("expert", as_tensor(found), expert[3:5])
        known = {0: "a", 4: "b", 12: "c", 16: "d", 20: "e"}
        assert piece.held(known) == ["c", "d"]
        assert rows.held(known) == list("abcde")


def test_vectors_of_a_base_and_its_models() -> None:
    base, experts = tensors((3,), FLOATS, 2)
    rows = Rows(base, experts, "F32")
    assert rows.vectors(Vectors()) == (None, experts)
    assert rows.vectors(Vectors(on_base=True)) == (base, experts)
    origin, vectors = rows.vectors(Vectors(with_base=True))
    assert origin is None
    assert [id(vector) for vector in vectors] == [id(base), *map(id, experts)]


def test_the_backend_of_each_op_is_told() -> None:
    run = Runner("native")
    base, experts = tensors((128, 65), FLOATS, 2)
    arrays = Rows(Array.of(base), [Array.of(each) for each in experts], "F32")
    for method in ("ties", "dare_ties", "karcher", "linear"):
        parameters = {} if method == "karcher" else {"weight": 0.5} if method == "linear" else SPARSE
        action = action_of(method, 2, parameters)
        if isinstance(action, Reduce):
            in_pieces(action, run, [arrays.cut(0, 64), arrays.cut(64, 128)])
        merged(action, run, arrays)
    used = {op: choice.backend for op, choice in run.choices.items()}
    assert set(used.values()) == {"native"}
    assert used.keys() >= {
        "trim_threshold",
        "magnitude_counts",
        "random_mask",
        "sparse_combine",
        "combine",
        "task_dots",
    }
