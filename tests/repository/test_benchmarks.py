"""The benchmarks cover every op, compare what is comparable, and say what they leave out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from benchmarks.harness import layers, synthetic
from benchmarks.merges import targets
from benchmarks.ops import cases, run
from benchmarks.wemoe import decode
from pymerge.backends import measured
from pymerge.backends.runner import BACKENDS
from pymerge.ops import OPS
from tests.helpers.checkpoints import load_output

TINY = layers.Size(40, 24, 3)


def test_every_op_is_timed() -> None:
    assert {cases.op_of(name) for name in cases.CASES} == OPS.keys() <= cases.CASES.keys()


@pytest.mark.parametrize("op", cases.CASES)
@pytest.mark.parametrize("size", [TINY, layers.Size(16, 56, 2)], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", run.DTYPES)
def test_published_forms_compute_what_the_ops_do(op: str, size: layers.Size, dtype: str) -> None:
    case, layer = cases.CASES[op], layers.Layer(size, run.DTYPES[dtype], "cpu")
    assert case.flops(layer) > 0
    assert case.bytes(size, 4) > 0
    assert case.peer is not None
    expected = run.as_tensors(case.op(layer).reference())
    found = case.peer.results(layer)
    assert 0 < len(found) <= len(expected)
    for theirs, ours in zip(found, expected, strict=False):
        assert run.relative(theirs, ours) <= case.peer.tolerance


class Limits(run.Limits):
    """Rates that need no measurement."""

    def __init__(self) -> None:
        self.copy, self.gemm = 1e10, {"float32": 1e11, "bfloat16": 5e10, "float64": 4e10}


def rows_of(monkeypatch: pytest.MonkeyPatch, op: str, **changes: object) -> list[dict[str, Any]]:
    monkeypatch.setitem(layers.SHAPES, "tiny", TINY)
    settings = {"device": "cpu", "backend": list(BACKENDS), "named": False, "seconds": 0.0, "seconds_limit": 60.0}
    bench = run.Bench("tiny", "bfloat16", argparse.Namespace(**(settings | changes)), Limits())
    bench.run(op)
    return bench.rows


def test_rows_of_one_op(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row["backend"]: row for row in rows_of(monkeypatch, "combine")}
    assert {"reference", "native", "peer"} <= rows.keys()
    native = rows["native"]
    assert (native["kind"], native["dtype"], native["limit"]) == ("time", "bfloat16", "copy")
    assert native["bytes"] == 5 * 40 * 24 * 2
    median = native["seconds"]["median"]
    assert native["share_of_limit"] == pytest.approx(native["bytes"] / median / 1e10)
    assert native["speedup_over_reference"] == pytest.approx(rows["reference"]["seconds"]["median"] / median)


def test_what_is_measured_on_a_device_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a run, in which Triton's interpreter stands for a device, become rows of the table that auto reads."""
    machine = {"device": "NVIDIA Test 9000", "commit": "abc"}
    for op in ("combine", "wudi_adam"):
        rows = rows_of(monkeypatch, op, backend=["triton"])
        medians = {row["backend"]: row["seconds"]["median"] for row in rows}
        assert medians.keys() >= {"reference", "triton", "peer"}
        results = {"date": "2030-01-02T03:04:05", "machine": machine, "rows": rows}
        (row,) = measured.from_results(results)
        dtype = "bfloat16" if op == "combine" else "float32"
        assert row[:4] == ("NVIDIA Test 9000", op, dtype, (1, 40, 24))
        best = min("reference", "triton", key=lambda backend: medians[backend])
        assert (row.backend, row.speedup) == (best, round(medians["reference"] / medians[best], 3))


def test_what_takes_too_long_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = rows_of(monkeypatch, "wudi_adam", seconds_limit=0.0)
    assert (row["kind"], row["backend"]) == ("skipped", "all")
    assert "--seconds-limit 0" in row["reason"]


def test_checkpoints_are_the_same_every_time_and_load(tmp_path: Path) -> None:
    first, second = (synthetic.make("tiny", tmp_path / name) for name in ("first", "second"))
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(files) == 4 * (3 + 2)  # shards, index and config.json of each model
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file

    name = "model.layers.1.mlp.down_proj.weight"

    base = load_output(first / "base")[name].float()
    for index, size in enumerate(synthetic.SIZES_OF_DELTAS, 1):
        delta = load_output(first / f"expert-{index}")[name].float() - base
        assert float(delta.norm() / base.norm()) == pytest.approx(size, rel=0.1)
    model = AutoModelForCausalLM.from_pretrained(first / "expert-3")
    assert sum(parameter.numel() for parameter in model.parameters()) * 2 == synthetic.SHAPES["tiny"].nbytes()


def test_big_shapes_are_the_models_they_stand_for() -> None:
    sizes = {name: (len(shape.tensors()), shape.nbytes()) for name, shape in synthetic.SHAPES.items()}
    assert sizes["135M"] == (272, 269_030_016)
    assert sizes["1.2B"] == (146, 2_471_628_800)


def test_targets_are_judged() -> None:
    row = {
        "kind": "merge",
        "form": "pymerge",
        "method": "linear",
        "size": "135M",
        "over_floor": 9.0,
        "speedup_over_mergekit": 4.9,
        "share_of_mergekits_peak": 0.2,
        "peak": 500,
        "largest_tensor": 100,
    }
    big = row | {"size": "1.2B", "over_floor": 1.5, "speedup_over_mergekit": None, "peak": 1000, "largest_tensor": 700}
    start = {"kind": "start-up", "wall": {"median": 0.3}}
    judged = [(target["what"].split(":")[0], target["met"]) for target in targets.judge([start, row, big])]
    assert judged == [
        ("pymerge --help within 0.4 s", True),
        ("linear, 135M", False),  # not fast enough
        ("linear, 135M", True),  # but small
        ("linear, 1.2B", True),
        ("linear", True),  # 500 more bytes, 600 more in the largest tensor
    ]


def test_decoding_gives_the_tokens_of_the_static_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMERGE_BENCH_CACHE", str(tmp_path))
    storages = ["dense float32", "dense", "pruned 0.9", "low rank 32"]
    options = argparse.Namespace(storages=storages, tokens=5, seconds=0.0)
    rows = {row["model"]: row for row in decode.compare("tiny", options)}
    assert list(rows) == ["plain", *storages]
    assert [rows[name]["tokens_as_static"] for name in storages] == [5] * 4
    assert rows["plain"]["share_of_plain"] == 1.0
    assert all(row["seconds"]["median"] > row["prompt_seconds"]["min"] / 2 > 0 for row in rows.values())
