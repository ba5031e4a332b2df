"""Merges in native code, from files to files: the same bytes as PyTorch's, the same errors, and no PyTorch."""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from pymerge import api
from pymerge.backends.native import magnitude_counts, magnitude_mask, random_mask
from pymerge.common import arrays
from pymerge.engine import native_worker
from pymerge.engine.run import run
from pymerge.errors import CheckpointError, NonFiniteError, OutOfMemoryError
from pymerge.methods import reduce
from pymerge.planner import build, fit
from pymerge.planner.plan import Plan
from tests.helpers.checkpoints import change, load_output, tree, write_config, write_model, write_models
from tests.helpers.imports import modules_after

UP, NORM, COUNTER = "model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.counter"


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Several pieces of 3 * 2^19 elements, sizes that no block divides, an empty tensor, a scalar, a buffer."""
    generator = torch.Generator().manual_seed(1)
    found = {
        UP: torch.randn(1800, 901, generator=generator),
        NORM: torch.randn(77, generator=generator),
        "model.scale": torch.randn((), generator=generator),
        "model.layers.0.mlp.empty.weight": torch.zeros(0, 5),
    }
    return {name: tensor.to(dtype) for name, tensor in found.items()} | {COUNTER: torch.arange(5)}


def native_plan(folder: Path, method: str, **parameters: Any) -> Plan:
    plan = api.plan(write_config(folder, method, **parameters), device="cpu")
    assert {step.worker for step in plan.steps} == {"native"}
    assert not plan.needs_torch
    return plan


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name.endswith(".safetensors")}


def same_as_reference(plan: Plan, folder: Path) -> None:
    """Merge natively and with PyTorch, and compare all bytes of the weights."""
    plain = api.plan(plan.config, device="cpu", backend="reference")
    assert {step.worker for step in plain.steps} == {"torch"}
    native, computed = run(plan, folder / "native", overwrite=True), run(plain, folder / "plain", overwrite=True)
    assert (native.bytes_read, native.bytes_written) == (computed.bytes_read, computed.bytes_written)
    assert weights(folder / "native") == weights(folder / "plain")
    assert load_output(folder / "native").keys() == load_output(folder / "base").keys()


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_bytes_are_those_of_pytorch(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    write_models(tmp_path, tensors(dtype))
    same_as_reference(native_plan(tmp_path, method), tmp_path)


@pytest.mark.parametrize("out", ["float32", "bfloat16", "float16"])
def test_inputs_of_several_dtypes(tmp_path: Path, out: str) -> None:
    write_models(tmp_path, tensors())
    change(tmp_path / "e0", lambda found: found.update({name: found[name].half() for name in (UP, NORM)}))
    change(tmp_path / "e1", lambda found: found.update({UP: found[UP].bfloat16()}))
    for method in ("linear", "task_arithmetic"):
        same_as_reference(native_plan(tmp_path, method, more=f"out_dtype: {out}"), tmp_path)


@pytest.mark.parametrize(("threads", "block", "limit"), [("1", 1, None), ("3", 1000, "1MiB"), ("8", 2**20, "64MiB")])
def test_threads_blocks_and_memory_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: str, block: int, limit: str | None
) -> None:
    write_models(tmp_path, {name: tensor[:50] if tensor.ndim == 2 else tensor for name, tensor in tensors().items()})
    config = write_config(tmp_path, "task_arithmetic")
    run(api.plan(config, device="cpu"), tmp_path / "first")
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(native_worker, "BLOCK_ELEMENTS", block)
    run(api.plan(config, device="cpu", memory=limit), tmp_path / "second")
    assert weights(tmp_path / "first") == weights(tmp_path / "second")


@pytest.mark.parametrize("out", [None, "float32", "bfloat16", "float16"])
def test_copies_and_conversions(tmp_path: Path, out: str | None) -> None:
    found = tensors(torch.bfloat16)
    found[NORM][:4] = torch.tensor([0.0, -0.0, 1e-40, -1e-40])
    write_models(tmp_path, found, experts=1)
    more = "" if out is None else f"out_dtype: {out}"
    same_as_reference(native_plan(tmp_path, "passthrough", experts=1, scale=1.0, more=more), tmp_path)
    expected = load_output(tmp_path / "e0")[NORM].to(getattr(torch, out or "bfloat16"))
    written = load_output(tmp_path / "native")[NORM]
    assert torch.equal(written.signbit(), expected.signbit())
    assert torch.equal(written, expected)
    same_as_reference(native_plan(tmp_path, "passthrough", experts=1, scale=0.5, more=more), tmp_path)


def test_nothing_of_pytorch_is_imported(tmp_path: Path) -> None:
    write_models(tmp_path, tensors(torch.bfloat16), config={"model_type": "x"})
    for method in ("linear", "task_arithmetic"):
        config = write_config(tmp_path, method)
        for where in ("", "device='cpu', ") if not torch.cuda.is_available() else ("device='cpu', ",):
            code = f"import pymerge; pymerge.merge({str(config)!r}, {str(tmp_path / 'out')!r}, {where}overwrite=True)"
            loaded = modules_after(code)
            assert "pymerge" in loaded
            assert loaded & {"torch", "numpy", "triton", "safetensors", "transformers"} == set()
    assert load_output(tmp_path / "out")[UP].dtype == torch.bfloat16


WITHOUT_TORCH: dict[str, dict[str, Any]] = {
    "linear": {},
    "passthrough": {"scale": 0.5},
    "ties": {"weight": 0.5},  # density 1: elementwise
    "ties, density 0.4": {"weight": 0.5, "density": 0.4},
    "ties, scope model": {"weight": 0.5, "density": 0.4, "scope": "model"},
    "dare_ties": {"weight": 0.5, "density": 0.4},
    "della": {"weight": 0.5, "density": 0.4},
    "breadcrumbs": {"weight": 0.5, "density": 0.4},
    "nearswap": {"t": 0.01},
    "ram": {},
    "ramplus_tl": {},
    "sce": {"select_topk": 0.5},
    "arcee_fusion": {},
    "slerp": {"t": 0.5},
    "karcher": {},
    "model_stock": {},
    "model_stock, rows": {"filter_wise": True},
    "nuslerp, rows": {"weight": 0.4, "nuslerp_flatten": False},
    "nuslerp, columns": {"weight": 0.4, "nuslerp_flatten": False, "nuslerp_row_wise": True},
}
ONE_MODEL = ("passthrough", "nearswap", "arcee_fusion", "slerp")


@pytest.mark.parametrize("case", WITHOUT_TORCH)
def test_methods_do_without_pytorch(tmp_path: Path, case: str) -> None:
    """Where all of it is in native code, nothing imports PyTorch; what is elementwise is no exception, nor are float64
    tensors, in all models or in one."""
    write_models(tmp_path, tensors(torch.bfloat16), config={"model_type": "x"})
    change(tmp_path / "base", lambda found: found.update({NORM: found[NORM].double()}))
    change(tmp_path / "e0", lambda found: found.update({name: found[name].double() for name in (NORM, UP)}))
    method = case.partition(",")[0]
    config = write_config(tmp_path, method, experts=1 if method in ONE_MODEL else 2, **WITHOUT_TORCH[case])
    code = f"import pymerge; pymerge.merge({str(config)!r}, {str(tmp_path / 'out')!r}, device='cpu')"
    assert modules_after(code) & {"torch", "triton", "safetensors", "transformers"} == set()
    found = load_output(tmp_path / "out")
    assert (found[UP].dtype, found[NORM].dtype) == (torch.bfloat16, torch.float64)


# Which models are float64, whether inputs are held between passes, whether one has NaN and infinity.
DOUBLE = [
    (("base", "e0", "e1"), True, False),
    (("base",), False, False),
    (("e1",), False, True),
    (("e0", "e1"), True, True),
]


@pytest.mark.parametrize(("folders", "held", "nonfinite"), DOUBLE, ids=str)
@pytest.mark.parametrize("case", WITHOUT_TORCH)
def test_float64_gives_the_bytes_of_pytorchs_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, folders: tuple[str, ...], held: bool, nonfinite: bool
) -> None:
    """In ranges, on one thread and on three."""
    write_models(tmp_path, small())
    for folder in folders:
        change(tmp_path / folder, _widen)
    if nonfinite:
        change(tmp_path / "e0", lambda found: found[UP][100, 7:9].copy_(torch.tensor([float("nan"), float("inf")])))
    monkeypatch.setattr(fit, "HELD_BYTES", 2**28 if held else 0)
    more = f"allow_nonfinite: {str(nonfinite).lower()}"
    merged = both_workers(tmp_path, monkeypatch, case, more)
    assert merged[0] == merged[1] == merged[2]


def small() -> dict[str, torch.Tensor]:
    return {name: tensor[:150] if tensor.ndim == 2 else tensor for name, tensor in tensors(torch.bfloat16).items()}


def both_workers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, case: str, more: str = ""
) -> tuple[dict[str, bytes], ...]:
    """Weights of the native worker on one thread and on three, and of PyTorch's with C++ ops; ranges are short."""
    monkeypatch.setattr(reduce, "RANGE_ELEMENTS", 2**16)
    method = case.partition(",")[0]
    experts = 1 if method in ONE_MODEL else 2
    config = write_config(folder, method, experts=experts, more=more, **WITHOUT_TORCH[case])
    found = []
    for threads, worker in (("1", "native"), ("3", "native"), ("1", "torch")):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        if worker == "torch":
            monkeypatch.setattr(build, "worker_of", lambda *_, **__: "torch")
        plan = api.plan(config, device="cpu")
        assert {step.worker for step in plan.steps} == {worker}
        run(plan, folder / "out", overwrite=True)
        found.append(weights(folder / "out"))
    return tuple(found)


@pytest.mark.parametrize("case", WITHOUT_TORCH)
def test_8_bit_floats_give_the_bytes_of_pytorchs_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """They are decoded as they are read, whatever their kind."""
    write_models(tmp_path, small())
    for folder, kind in (("base", "e4m3fn"), ("e0", "e5m2"), ("e1", "e4m3fnuz")):
        dtype = getattr(torch, f"float8_{kind}")
        change(tmp_path / folder, lambda found, dtype=dtype: found.update({UP: found[UP].to(dtype)}))
    merged = both_workers(tmp_path, monkeypatch, case)
    assert merged[0] == merged[1] == merged[2]


FLOAT8 = ["e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz"]
BUFFER = f"layers: [{{pattern: '{COUNTER}', kind: buffer}}]"


@pytest.mark.parametrize("kind", FLOAT8)
def test_all_8_bit_floats_as_they_are_and_converted(tmp_path: Path, kind: str) -> None:
    """A weight becomes bfloat16, a buffer stays as it is; without PyTorch."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(getattr(torch, f"float8_{kind}"))
    finite = values[values.float().isfinite()]
    for folder in ("base", "e0"):
        write_model(tmp_path / folder, {NORM: finite, COUNTER: finite.clone()})
    config = write_config(tmp_path, "passthrough", experts=1, scale=1.0, more=BUFFER)
    code = f"import pymerge; pymerge.merge({str(config)!r}, {str(tmp_path / 'out')!r}, device='cpu')"
    assert "torch" not in modules_after(code)
    found = load_output(tmp_path / "out")
    assert torch.equal(found[NORM], finite.bfloat16())
    assert torch.equal(found[NORM].signbit(), finite.bfloat16().signbit())
    assert torch.equal(found[COUNTER].view(torch.uint8), finite.view(torch.uint8))


@pytest.mark.parametrize("name", [NORM, COUNTER])
def test_an_8_bit_float_that_is_not_finite_is_named(tmp_path: Path, name: str) -> None:
    found = {NORM: torch.ones(8).to(torch.float8_e5m2), COUNTER: torch.ones(8).to(torch.float8_e5m2)}
    found[name].view(torch.uint8)[5] = 0x7C  # infinity
    for folder in ("base", "e0"):
        write_model(tmp_path / folder, found)
    plan = native_plan(tmp_path, "passthrough", experts=1, scale=1.0, more=BUFFER)
    with pytest.raises(NonFiniteError, match=rf"model.safetensors: tensor '{name}' has 1 values .*\[5\]"):
        run(plan, tmp_path / "out")


def _widen(found: dict[str, torch.Tensor]) -> None:
    """In float64 what float32 cannot hold: deltas of very different sizes, in the last digits."""
    generator = torch.Generator().manual_seed(len(found))
    for name in (UP, NORM):
        noise = torch.randn(found[name].shape, generator=generator, dtype=torch.float64)
        found[name] = found[name].double() + 1e-9 * noise


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_an_input_that_is_not_finite_is_named(tmp_path: Path, weight: float) -> None:
    write_models(tmp_path, tensors())
    change(tmp_path / "e1", lambda found: found[UP].view(-1)[1_600_000].fill_(float("nan")))
    plan = native_plan(tmp_path, "task_arithmetic", weight=weight)
    row, column = divmod(1_600_000, 901)
    with pytest.raises(
        NonFiniteError, match=rf"e1/model.safetensors: tensor '{UP}' has 1 values .* \[{row}, {column}\]"
    ):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_that_overflows_is_named(tmp_path: Path) -> None:
    write_models(tmp_path, {NORM: torch.full((8,), 40000.0)})
    plan = native_plan(tmp_path, "linear", weight=2.0, normalize=False, more="out_dtype: float16")
    with pytest.raises(NonFiniteError, match=rf"^{NORM}: the merged tensor has values that torch.float16 cannot hold"):
        run(plan, tmp_path / "out")


def test_values_that_are_not_finite_are_merged_where_that_is_allowed(tmp_path: Path) -> None:
    write_models(tmp_path, tensors())
    change(tmp_path / "e1", lambda found: found[NORM].view(-1)[3].fill_(float("inf")))
    same_as_reference(native_plan(tmp_path, "linear", more="allow_nonfinite: true"), tmp_path)
    assert load_output(tmp_path / "native")[NORM].isinf().tolist() == [i == 3 for i in range(77)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_nan_and_infinity_stay_where_they_are_in_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """Whatever bits a NaN has there."""
    special = torch.tensor([float("nan"), float("-inf"), float("inf"), -float("nan"), 1.5, -2.25])
    write_models(tmp_path, {NORM: special.repeat(9).to(dtype)}, experts=1)
    for out in ("float32", "bfloat16", "float16", "float64"):
        plan = native_plan(
            tmp_path, "passthrough", experts=1, scale=1.0, more=f"out_dtype: {out}\nallow_nonfinite: true"
        )
        run(plan, tmp_path / "out", overwrite=True)
        found, copied = (load_output(tmp_path / folder)[NORM] for folder in ("out", "e0"))
        assert found.dtype == getattr(torch, out)
        torch.testing.assert_close(found.double(), copied.double(), rtol=2.0**-8, atol=0, equal_nan=True)


def test_a_file_that_ends_too_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is cut after the plan is found before anything is written; one that is cut later, when it is opened,
    or by the read itself."""
    write_models(tmp_path, tensors())
    plan = native_plan(tmp_path, "linear")
    file = tmp_path / "e1/model.safetensors"
    size = file.stat().st_size
    with open(file, "r+b") as stream:
        stream.truncate(size - 4)
    with pytest.raises(CheckpointError, match=r"e1/model.safetensors: has changed since the merge was planned; plan"):
        run(plan, tmp_path / "out")
    monkeypatch.setattr(Plan, "check_inputs", lambda plan: None)
    with pytest.raises(CheckpointError, match=r"e1/model.safetensors: changed since the plan was made"):
        run(plan, tmp_path / "out")
    stamps: Any = plan.inputs.experts[1].stamps
    stamps[file] = (size - 4, file.stat().st_mtime_ns)
    with pytest.raises(CheckpointError, match=rf"e1/model.safetensors: ends at byte {size - 4}, inside tensor"):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_memory_for_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(nbytes: int) -> None:
        raise MemoryError(f"{nbytes} bytes cannot be mapped")

    write_models(tmp_path, tensors())
    plan = native_plan(tmp_path, "linear")
    monkeypatch.setattr("pymerge.common.arrays.map_pages", none_left)
    with pytest.raises(
        OutOfMemoryError, match=r"^model.counter: copy on \[2\] runs out of memory on cpu, .* \(.* cannot be mapped\)"
    ):
        run(plan, tmp_path / "out")


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
@pytest.mark.parametrize("missing", range(1, 9))
def test_memory_that_runs_out_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str, missing: int
) -> None:
    """At any of the first requests, of inputs, outputs or what lies between: the piece is done once more."""
    write_models(tmp_path, tensors())
    parameters = {} if method == "linear" else {"weight": 0.5, "density": 0.4}
    plan = native_plan(tmp_path, method, **parameters)
    run(plan, tmp_path / "whole")
    requests = count(1)

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if next(requests) == missing:
                raise MemoryError("none is left")
            return function(*arguments, **options)

        return wrapped

    monkeypatch.setattr("pymerge.common.arrays.map_pages", failing(arrays.map_pages))
    for op in (magnitude_counts, magnitude_mask, random_mask):
        monkeypatch.setattr(op, "compute", failing(op.compute))
    with caplog.at_level(logging.WARNING, "pymerge"):
        run(plan, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    failed = next(requests) > missing
    assert ("out of memory (none is left); once more" in caplog.text) == failed
    assert failed or method == "linear"


def test_every_byte_is_in_a_span(tmp_path: Path) -> None:
    write_models(tmp_path, tensors())
    plan = native_plan(tmp_path, "task_arithmetic")
    report = run(plan, tmp_path / "out", profile=tmp_path / "trace.json")
    moved: dict[str, int] = defaultdict(int)
    for span in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]:
        if span["ph"] == "X":
            moved[span["cat"]] += span["args"]["bytes"]
    assert moved["combine"] == report.bytes_read == plan.bytes_read
    assert moved["write"] == report.bytes_written == sum(step.nbytes for step in plan.steps)
    assert min(report.reading, report.computing, report.writing) > 0.0
    assert report.reading + report.computing + report.writing <= report.seconds
    assert report.backends == {"combine": "native"}


def test_the_choice_of_a_backend_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_models(tmp_path, tensors())
    plan = native_plan(tmp_path, "linear")
    with caplog.at_level(logging.INFO, "pymerge"):
        run(plan, tmp_path / "out")
    assert "combine: backend native (the C++ backend is the fastest on a CPU)" in caplog.text
