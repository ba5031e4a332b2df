"""Merges by several processes of one machine: the bytes of one, one error, nothing left running."""

from __future__ import annotations

import os
import pickle
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

import pymerge
from pymerge.common.devices import resolve_devices
from pymerge.errors import BackendError, PlanError
from tests.helpers.checkpoints import change, llama, llama_config, start, tree, write_config, write_models
from tests.helpers.checkpoints import pymerge as command

SIZE = ("--max-shard-size", "4KB")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = llama()
    return write_models(tmp_path_factory.mktemp("models"), base, config=llama_config(base))


def test_two_processes_write_what_one_does(models: Path, tmp_path: Path) -> None:
    config = write_config(models, "wudi", iterations=5)
    assert command("merge", config, tmp_path / "one", *SIZE).code == 0
    done = command("merge", config, tmp_path / "two", *SIZE, "--devices", "cpu,cpu", "--log-json", tmp_path / "log")
    assert done.code == 0, done
    assert "merged 21 tensors (5,456 parameters)" in done.out
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    log = (tmp_path / "log").read_text()
    assert log.count('"shard_finished"') == 8
    assert '"process": 2' in log


def test_an_error_of_a_process_is_told_once(models: Path, tmp_path: Path) -> None:
    base = llama()
    write_models(tmp_path, base, config=llama_config(base))

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] = torch.nan

    change(tmp_path / "e1", spoil)
    config = write_config(tmp_path, "linear")
    done = command("merge", config, tmp_path / "out", *SIZE, "--devices", "cpu,cpu")
    assert done.code == 6, done
    assert len(done.errors) == 1
    assert "model.norm.weight" in done.errors[0]
    assert "Traceback" not in done.err
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


def children_of(process: int) -> list[psutil.Process]:
    return [each for each in psutil.Process(process).children() if "pymerge.engine.child" in each.cmdline()]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stop_ends_all_processes_and_the_same_command_goes_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    base = {f"model.layers.{number:02d}.mlp.up_proj.weight": torch.eye(96) for number in range(9)}
    write_models(tmp_path, base, config={"model_type": "x"})
    arguments = ("merge", write_config(tmp_path, "wudi", iterations=800), "--max-shard-size", "30KB")
    out = tmp_path / "out"
    running = start(*arguments, out, "--devices", "cpu,cpu")
    running.wait_until(lambda: bool(list((out / ".pymerge").glob("*.safetensors.json"))))
    assert running._process.pid is not None
    children = children_of(running._process.pid)
    assert children
    running.send(number)
    done = running.wait()
    assert done.code == code, done
    assert "Traceback" not in done.err
    psutil.wait_procs(children, timeout=30)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert os.listdir(out) == [".pymerge"]
    deadline = time.monotonic() + 10
    while (done := command(*arguments, out, "--devices", "cpu,cpu")).code == 8 and time.monotonic() < deadline:
        assert "another pymerge run is writing here" in done.err
    assert done.code == 0, done
    assert command(*arguments, tmp_path / "one").code == 0
    assert tree(out) == tree(tmp_path / "one")


def test_lists_of_devices() -> None:
    assert resolve_devices("cpu, cpu") == ["cpu", "cpu"]
    with pytest.raises(BackendError, match="unknown device ''"):
        resolve_devices("cpu,")
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="PyTorch sees no CUDA device here"):
            resolve_devices("all")


def test_what_does_not_go_with_devices(models: Path, tmp_path: Path) -> None:
    with pytest.raises(pymerge.PymergeError, match="leave device, part and profile out"):
        pymerge.merge(write_config(models, "linear"), tmp_path / "out", devices="cpu,cpu", part=(1, 2))


def test_problems_of_a_plan_come_whole_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(PlanError(["one", "two"])))
    assert error.problems == ["one", "two"]
    assert str(error) == str(PlanError(["one", "two"]))
