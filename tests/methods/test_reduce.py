"""Methods that look at a whole tensor, in row ranges that are read again: the same bytes, in a part of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pymerge.methods.parts import Between
from pymerge.methods.tensor_parts import TensorPart
from safetensors.torch import load_file

import pymerge
from pymerge import api
from pymerge.backends.runner import Runner
from pymerge.common.devices import Device
from pymerge.engine import streams
from pymerge.engine.recheck import recheck
from pymerge.engine.run import run
from pymerge.errors import NonFiniteError
from pymerge.methods.reduce import RANGE_ELEMENTS, ranges
from pymerge.methods.selection import Selection, passes_to_select
from pymerge.planner import fit
from tests.helpers.checkpoints import change, write_config, write_models

MIB = 2**20
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
IN_PYTORCH = ("nuslerp_flatten", "filter_wise")


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
    """Tensors of PyTorch that are held, those that are read in ranges, and files that are merged as they are read."""
    path = config(models, method, parameters)
    held, ranged = api.plan(path, device="cpu"), api.plan(path, device="cpu", memory=80 * MIB)
    streamed = streams.why_not(ranged.steps, Device("cpu"), "auto", allow_nonfinite=False) is None
    assert streamed == set(parameters).isdisjoint(IN_PYTORCH)
    files = [merged(plan, tmp_path / f"streamed-{index}") for index, plan in enumerate((held, ranged))]
    monkeypatch.setattr(streams, "why_not", lambda *_, **__: "a test")
    files += [merged(plan, tmp_path / f"computed-{index}") for index, plan in enumerate((held, ranged))]
    assert [plan.steps[0].held for plan in (held, ranged)] == [passes > 1, False]
    assert {len(plan.steps[0].pieces) for plan in (held, ranged)} == {3}
    assert ranged.steps[0].bytes_read == passes * held.steps[0].bytes_read
    assert ranged.peak_memory <= 80 * MIB
    assert files == files[:1] * 4


def merged(plan: Any, folder: Path) -> bytes:
    run(plan, folder, device="cpu")
    return (folder / "model.safetensors").read_bytes()


def test_what_is_larger_than_may_be_held_is_read_again(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config(models, "ties", {"weight": 1.0, "density": 0.5})
    for held in (6 * ROWS * COLUMNS, 6 * ROWS * COLUMNS - 1):
        monkeypatch.setattr(fit, "HELD_BYTES", held)
        assert api.plan(path, device="cpu").steps[0].held == (held == 6 * ROWS * COLUMNS)
    report = api.merge(path, tmp_path / "out", device="cpu", progress=False)
    assert report.bytes_read == 3 * 6 * ROWS * COLUMNS + 6 * COLUMNS
    found = recheck(tmp_path / "out")
    assert (sorted(found.tensors), found.problems) == ([EMBEDDING, "model.norm.weight"], [])


@pytest.mark.parametrize("memory", [None, 80 * MIB])
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


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("count", [0, 1, 700, 1500, 2999, 3000])
def test_selection_by_ranges_takes_the_elements_of_the_whole(backend: str, count: int) -> None:
    """Magnitudes of five values: the last one that is taken is in many elements, of several ranges."""
    run_op = Runner(backend)
    generator = torch.Generator().manual_seed(count)
    base = torch.zeros(3000)
    experts = [torch.randint(-4, 5, (3000,), generator=generator) / 8 for _ in range(2)]
    counts = [count, 1000]
    whole = run_op("magnitude_mask", base, experts, run_op("trim_threshold", base, experts, counts))
    selection = Selection(3000, counts)
    everything = TensorPart(run_op, base, experts, torch.float32)
    parts = [everything.rows(*rows) for rows in ((0, 512), (512, 1024), (1024, 2944), (2944, 3000))]
    for _ in range(passes_to_select(3000, counts)):
        for part in parts:
            selection.take(part.first, selection.count(part))
        selection.settle()
    bits = [part.magnitude_mask(Between(selection.of_range(part), None)).bits for part in parts]
    assert torch.equal(torch.cat(bits, dim=1)[:, : whole.bits.shape[1]], whole.bits)
    assert int(sum(byte.bit_count() for byte in whole.bits[0].tolist())) == count


def test_the_api_and_the_engine_give_the_same(models: Path, tmp_path: Path) -> None:
    path = config(models, "model_stock", {})
    api.merge(path, tmp_path / "out", device="cpu", memory=80 * MIB, progress=False)
    base, *experts = (load_file(models / name / "model.safetensors") for name in ("base", "e0", "e1"))
    merged = pymerge.merge_tensors(base[EMBEDDING], [expert[EMBEDDING] for expert in experts], "model_stock")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING], merged)
