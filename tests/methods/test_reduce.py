"""Methods that look at a whole tensor, in row ranges that are read again: the same bytes, in a part of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pymerge
from pymerge import api
from pymerge.engine.recheck import recheck
from pymerge.engine.run import run
from pymerge.errors import NonFiniteError
from pymerge.methods.reduce import RANGE_ELEMENTS, ranges
from pymerge.planner import build, fit
from pymerge.planner.steps import CACHE_LINE
from tests.helpers.checkpoints import change, write_config, write_models

LIMIT = 68 * 2**20  # bytes; more than any piece takes, less than the tensor in memory
ROWS, COLUMNS = 4000, 1000  # three ranges, the last one shorter
EMBEDDING = "model.embed_tokens.weight"
# Method, its parameters, and how often the large tensor is read where it is not held.
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("ties", {"weight": 0.6, "density": 0.3}, 3),
    ("ties", {"weight": 0.6, "density": 0.3, "rescale": True}, 4),
    ("breadcrumbs", {"weight": 0.6, "density": 0.5, "gamma": 0.1}, 3),
    ("dare_ties", {"weight": 0.6, "density": 0.4}, 2),
    ("dare_linear", {"weight": 0.6, "density": 0.4, "rescale": False}, 1),
    ("della", {"weight": 0.6, "density": 0.4}, 2),
    ("slerp", {"t": 0.3}, 2),
    ("nuslerp", {"weight": 0.4, "nuslerp_flatten": False}, 2),
    ("nuslerp", {"weight": 0.4, "nuslerp_flatten": False, "nuslerp_row_wise": True}, 2),
    ("multislerp", {"weight": 0.4}, 2),
    ("karcher", {}, 2),
    ("model_stock", {}, 2),
    ("model_stock", {"filter_wise": True}, 2),
    ("sce", {"select_topk": 0.3}, 4),
    ("sce", {}, 2),
    ("ramplus_tl", {"epsilon": 1e-3}, 2),
    ("arcee_fusion", {}, 3),
]
DRAWN = ("dare_ties", "dare_linear", "della")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two experts with one large tensor in bfloat16, whose task vectors have few different magnitudes."""
    generator = torch.Generator().manual_seed(0)
    base = {
        EMBEDDING: 0.02 * torch.randn(ROWS, COLUMNS, generator=generator),
        "model.norm.weight": torch.ones(COLUMNS),
    }
    folder = tmp_path_factory.mktemp("models")
    return write_models(
        folder,
        {name: tensor.bfloat16() for name, tensor in base.items()},
        config={"architectures": ["Small"], "torch_dtype": "bfloat16"},
    )


def config(models: Path, method: str, parameters: dict[str, Any]) -> Path:
    return write_config(models, method, experts=1 if method in ("slerp", "arcee_fusion") else 2, **parameters)


@pytest.mark.parametrize(("method", "parameters", "passes"), CASES, ids=str)
def test_ranges_give_the_bytes_of_the_whole(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, parameters: dict[str, Any], passes: int
) -> None:
    """Arrays and tensors of PyTorch, held between passes and read again in ranges: the bytes of the tensor in memory.

    C++ computes in both workers; that of tensors has several threads.
    """
    path = config(models, method, parameters)
    held, ranged = plans = [api.plan(path, device="cpu", memory=memory) for memory in (None, LIMIT)]
    assert {step.worker for plan in plans for step in plan.steps} == {"native"}
    assert [plan.steps[0].held for plan in plans] == [passes > 1, False]
    assert {len(plan.steps[0].pieces) for plan in plans} == {3}
    assert ranged.steps[0].bytes_read == passes * held.steps[0].bytes_read
    assert ranged.peak_memory <= LIMIT
    files = [merged(plan, tmp_path / f"out-{index}") for index, plan in enumerate(plans)]
    monkeypatch.setattr(build, "worker_of", lambda *_, **__: "torch")
    plans = [api.plan(path, device="cpu", memory=memory) for memory in (None, LIMIT)]
    assert {step.worker for plan in plans for step in plan.steps} == {"torch"}
    assert max(plan.peak_memory for plan in plans[1:]) <= LIMIT
    files += [merged(plan, tmp_path / f"computed-{index}") for index, plan in enumerate(plans)]
    assert files == files[:1] * len(files)
    names = ("base", "e0") if method in ("slerp", "arcee_fusion") else ("base", "e0", "e1")
    base, *experts = (load_file(models / name / "model.safetensors")[EMBEDDING] for name in names)
    if method not in DRAWN:  # whose random numbers depend on the name
        whole = pymerge.merge_tensors(base, experts, method, **parameters)
        assert torch.equal(load_file(tmp_path / "out-0/model.safetensors")[EMBEDDING], whole)


def merged(plan: Any, folder: Path) -> bytes:
    run(plan, folder)
    return (folder / "model.safetensors").read_bytes()


def test_what_is_larger_than_may_be_held_is_read_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(models, "ties", {"weight": 1.0, "density": 0.5})
    whole = 6 * ROWS * COLUMNS + 3 * CACHE_LINE
    for held in (whole, whole - 1):
        monkeypatch.setattr(fit, "HELD_BYTES", held)
        assert api.plan(path, device="cpu").steps[0].held == (held == whole)
    report = api.merge(path, tmp_path / "out", device="cpu", progress=False)
    assert report.bytes_read == 3 * 6 * ROWS * COLUMNS + 6 * COLUMNS
    found = recheck(tmp_path / "out")
    assert (sorted(found.tensors), found.problems) == ([EMBEDDING, "model.norm.weight"], [])


@pytest.mark.parametrize("memory", [None, LIMIT])
@pytest.mark.parametrize("method", ["slerp", "ties", "dare_ties", "karcher", "sce", "ramplus_tl", "arcee_fusion"])
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_what_is_not_finite_is_named_where_it_is(tmp_path: Path, value: str, method: str, memory: int | None) -> None:
    """Not where the result shows it first."""
    base = {EMBEDDING: torch.ones(ROWS, COLUMNS), "model.norm.weight": torch.ones(COLUMNS)}
    write_models(tmp_path, base, config={"architectures": ["Small"]})
    change(tmp_path / "e0", lambda tensors: tensors[EMBEDDING][3900, 7].fill_(float(value)))
    parameters = {"slerp": {"t": 0.5}, "sce": {"select_topk": 0.5}}.get(method, {})
    if method in ("ties", "dare_ties"):
        parameters = {"weight": 1.0, "density": 0.5}
    path = write_config(tmp_path, method, experts=1, **parameters)
    with pytest.raises(NonFiniteError, match=r"e0/model.safetensors: tensor 'model.embed_tokens.weight'.*\[3900, 7\]"):
        api.merge(path, tmp_path / "out", device="cpu", memory=memory, progress=False)


@pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (3000, 1001), (40, 300, 500), (1 << 22,), (), (0, 7)], ids=str)
def test_ranges_cover_a_tensor_from_multiples_of_64_on(shape: tuple[int, ...]) -> None:
    found = ranges(shape)
    row = torch.empty(shape).view(shape[0], -1).shape[1] if shape and 0 not in shape else 1
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == (shape[0] if shape else 1)
    assert all(start * row % 64 == 0 for start, _ in found)
    if len(shape) == 1:
        assert len(found) == 1  # ranks go along the last axis
    else:
        assert all((stop - start) * row <= max(RANGE_ELEMENTS, 64 * row) for start, stop in found)


def test_the_api_and_the_engine_give_the_same(models: Path, tmp_path: Path) -> None:
    path = config(models, "model_stock", {})
    api.merge(path, tmp_path / "out", device="cpu", memory=LIMIT, progress=False)
    base, *experts = (load_file(models / name / "model.safetensors") for name in ("base", "e0", "e1"))
    merged = pymerge.merge_tensors(base[EMBEDDING], [expert[EMBEDDING] for expert in experts], "model_stock")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING], merged)
