"""--device-memory: what the plan gives a CUDA device by its accounting, what does not fit, what the allocator hears."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pymerge import api
from pymerge.common.devices import Device
from pymerge.common.units import format_bytes, parse_bytes
from pymerge.engine.run import limit_device
from pymerge.errors import ArgumentError, PlanError
from pymerge.methods import METHODS
from pymerge.planner.budget import DEVICE_SHARE, Budget, budget
from pymerge.planner.fit import fit, pinned_bytes
from pymerge.planner.jobs import batches, read_threads
from pymerge.planner.steps import Step
from pymerge.planner.window import forecast
from tests.helpers.checkpoints import refused, write_config, write_models
from tests.helpers.collected import write_grams

MIB = 2**20
GPU = Device("cuda", 0)
LAYERS = {f"model.layers.{number}.mlp.up_proj.weight": torch.zeros(96, 128) for number in range(6)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with 100 MiB, 60 of them free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * MIB, 100 * MIB))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"), LAYERS)


def steps_of(folder: Path, method: str) -> tuple[Step, ...]:
    known = {"density": 0.5, "weight": 0.5, "epsilon": 0.1, "gamma": 0.01, "t": 0.3, "select_topk": 0.5}
    parameters = {
        each.name: known[each.name] for each in METHODS[method].parameters if each.name in known and not each.choices
    }
    if METHODS[method].needs_grams:
        parameters["grams"] = write_grams(folder / "grams.safetensors", LAYERS)
    most = METHODS[method].most_experts
    config = write_config(folder, method, experts=2 if most is None else most, **parameters)
    return api.plan(config, device="cpu").steps


@pytest.mark.usefixtures("gpu")
def test_the_share_of_tensors() -> None:
    free, given = budget(GPU), budget(GPU, 7 * MIB, 20 * MIB)
    assert (free.tensors, free.device_limit) == (int(DEVICE_SHARE * 60 * MIB), None)
    assert (given.tensors, given.host, given.device_limit) == (int(DEVICE_SHARE * 20 * MIB), 7 * MIB, 20 * MIB)
    assert given.origin == "80% of --device-memory 20.00MiB"


@pytest.mark.usefixtures("gpu")
def test_no_more_than_there_is() -> None:
    with pytest.raises(ArgumentError, match=r"is more than the 60\.00MiB that are free on cuda:0; give less"):
        budget(GPU, None, 61 * MIB)


def test_a_cpu_has_none(folder: Path) -> None:
    config = write_config(folder, "linear")
    given = ("--device", "cpu", "--device-memory", "1GiB")
    refused(folder, ArgumentError.exit_code, "--device-memory limits the memory of a GPU", args=given)
    with pytest.raises(ArgumentError, match="leave it out, --memory limits all of it"):
        api.plan(config, device="cpu", device_memory="1GiB")


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].needs_data])
def test_what_is_named_as_the_least_is_enough(folder: Path, method: str) -> None:
    """And what the plan then holds at once, with everything read ahead and waiting, is within the limit."""
    steps = steps_of(folder, method)
    with pytest.raises(PlanError) as refusal:
        fit(steps, of_device(1))
    least = str(refusal.value).split("give --device-memory ")[1].split(" or more")[0]
    limits = of_device(parse_bytes(least))
    queue = batches(fit(steps, limits), limits)
    assert forecast(queue, limits.tensors, 2).peak <= limits.tensors <= limits.device_limit


def test_pinned_buffers_are_of_the_host(folder: Path) -> None:
    steps = steps_of(folder, "wudi_flow")
    limits = of_device(64 * MIB)
    pinned = pinned_bytes(fit(steps, limits), limits)
    assert pinned == (read_threads("cuda") + 1) * 2**16  # 96 x 128 float32, to a power of two
    size = re.escape(format_bytes(pinned))
    needs = f"takes {size} of pinned memory.*give --memory {size} or more"
    with pytest.raises(PlanError, match=needs):
        fit(steps, replace(limits, host=pinned - 1))


def test_the_allocator_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the device already, such as a model in use, is not of the merge."""
    told: list[tuple[float, str]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=100 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10 * MIB)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *args: told.append(args))
    limit_device(GPU, 40 * MIB)
    limit_device(GPU, 95 * MIB)
    assert told == [(0.5, "cuda:0"), (1.0, "cuda:0")]


def of_device(limit: int) -> Budget:
    return Budget("cuda", 2**40, int(DEVICE_SHARE * limit), 2**40, "given", limit)
