"""Merges killed at random moments, or on a disk that fills up, and started again: the same bytes every time.

`make torture` does it a hundred times a signal (PYMERGE_TORTURE=1); the plain tests do it a few times.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.helpers.adapters import factors, write_adapter
from tests.helpers.checkpoints import (
    CARRIED,
    checksums,
    llama,
    llama_config,
    pymerge,
    start,
    write_config,
    write_model,
    write_models,
)

FULL = bool(os.environ.get("PYMERGE_TORTURE"))
KILLS = 100 if FULL else 6
DISKS = 180 if FULL else 3
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Scene:
    """A command, what its output must be, when it begins to write and ends, what is in the directory before, and what
    its process does first."""

    name: str
    arguments: tuple[str | Path, ...]
    expected: dict[str, str]
    begins: float
    ends: float
    prepare: Callable[[Path], object]
    before: Callable[[], object] | None


def scene(
    folder: Path,
    name: str,
    *more: str | Path,
    command: str = "merge",
    prepare: Callable[[Path], object] = lambda out: None,
    before: Callable[[], object] | None = None,
) -> Scene:
    """The merge of folder/NAME.yml, or another command, done once without a break to know its bytes and its time."""
    arguments = ("merge", folder / f"{name}.yml", *more) if command == "merge" else (command, *more)
    out = folder / f"unbroken-{name}{len(more)}"
    prepare(out)
    started = time.monotonic()
    running = start(*arguments, out, before=before)
    running.wait_until((out / ".pymerge").exists)
    begins = time.monotonic() - started
    running.wait_until(lambda: (out / "pymerge_manifest.json").exists() and not (out / ".pymerge").exists())
    ends = time.monotonic() - started
    done = running.wait()
    assert done.code == 0, done
    return Scene(name, arguments, checksums(out), begins, ends, prepare, before)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Scene]:
    folder = tmp_path_factory.mktemp("kill")
    base = llama()
    write_models(folder, base, config=llama_config(base))
    write_model(folder / "base", base, config=llama_config(base), files=CARRIED)
    parameters: dict[str, dict[str, float]] = {"linear": {}, "wudi": {"iterations": 40}, "ace": {}}
    parameters["ties"] = {"weight": 1.0, "density": 0.5}
    for method, values in parameters.items():
        write_config(folder, method, **values).rename(folder / f"{method}.yml")
    pymerge("merge", folder / "linear.yml", folder / "warm")  # the first command starts the server of forks

    def earlier(out: Path) -> None:
        assert pymerge("merge", folder / "ace.yml", out).code == 0

    return [
        scene(folder, "linear", "--max-shard-size", "2KB"),
        scene(folder, "wudi", "--max-shard-size", "5KB"),
        scene(folder, "ace"),
        scene(folder, "ties", "--max-shard-size", "3KB"),
        scene(folder, "linear", "--max-shard-size", "4KB", "--overwrite", prepare=earlier),
    ]


def small_parts() -> None:
    """Have adapters made in parts of two tensors or so."""
    importlib.import_module("pymerge.extraction.parts").PART_BYTES = 5000


@pytest.fixture(scope="module")
def scenes_of_adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Scene]:
    """An extraction, an exact merge of adapters, and one that is cut, with norms that are saved."""
    folder = tmp_path_factory.mktemp("kill")
    base = llama(blocks=3)
    write_models(folder, base, experts=1, config=llama_config(base))
    modules = [name.removesuffix(".weight") for name in base if "_proj" in name]
    norm = {"base_model.model.model.norm.weight": torch.ones(16)}
    for name, more in (("one", {}), ("two", norm)):
        write_adapter(folder / name, factors(base, modules, 3, len(more)) | more, r=3, modules_to_save=["norm"])
    for method, parameters in {"task_arithmetic": "weight: 0.5", "ties": "{weight: 1.0, density: 0.5}"}.items():
        models = "".join(f"  - {{model: {name}}}\n" for name in ("one", "two"))
        text = f"merge_method: {method}\nbase_model: base\nmodels:\n{models}parameters: {parameters}\n"
        (folder / f"{method}.yml").write_text(text.replace("parameters: weight", "parameters:\n  weight"))
    models = ("--base", folder / "base", "--model", folder / "e0", "--rest", "full", "--rank", "4")
    merged = ("--adapter", "--full-tensors", "save")
    pymerge("extract", *models, folder / "warm")
    return [
        scene(folder, "extract", *models, command="extract", before=small_parts),
        scene(folder, "task_arithmetic", *merged, before=small_parts),
        scene(folder, "ties", *merged, "--rank", "4", before=small_parts),
    ]


def stage(out: Path) -> str:
    """How far a merge had come when it was stopped."""
    file = out / ".pymerge/state.json"
    if not file.exists():
        return "done" if (out / "pymerge_manifest.json").exists() else "not begun"
    state = json.loads(file.read_text())
    if state["publishing"]:
        return "publishing"
    return "some shards" if list(file.parent.glob("*.safetensors.json")) else "no shard"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_merge_stopped_anywhere_gives_the_same_bytes(
    scenes: list[Scene], tmp_path: Path, number: signal.Signals
) -> None:
    stop_anywhere(scenes, tmp_path, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_an_adapter_stopped_anywhere_has_the_same_bytes(
    scenes_of_adapters: list[Scene], tmp_path: Path, number: signal.Signals
) -> None:
    stop_anywhere(scenes_of_adapters, tmp_path, number)


def stop_anywhere(scenes: list[Scene], tmp_path: Path, number: signal.Signals) -> None:
    """Send a signal at random moments, `KILLS` times, and run the command again until it ends."""
    generator = random.Random(number.value)
    stages: Counter[str] = Counter()
    stopped = again = 0
    trial = 0
    while stopped < KILLS:
        trial += 1
        assert trial < 4 * KILLS, "too few of the signals arrived in time"
        chosen = scenes[trial % len(scenes)]
        out = tmp_path / str(trial)
        chosen.prepare(out)
        in_row = 0
        while True:
            running = start(*chosen.arguments, out, before=chosen.before)
            if in_row < 3 and (in_row == 0 or generator.random() < 0.3):
                running.send_after(generator.uniform(0.9 * chosen.begins, 1.05 * chosen.ends), number)
            done = running.wait()
            assert "Traceback" not in done.err, done
            if done.code == 0:
                break
            # Python is stopped by the signal itself before pymerge has installed its handler.
            assert done.code in ({-number} if number == signal.SIGKILL else {-number, 143}), done
            stages[stage(out)] += 1
            stopped += 1
            again += in_row > 0
            in_row += 1
        assert checksums(out) == chosen.expected, (chosen.name, trial)
    print(f"\n{number.name}: {stopped} stops in {trial} merges, {again} of them while resuming; {dict(stages)}")


IN_TMPFS = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"'


def test_a_disk_that_fills_up_at_any_moment(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    command = [*IN_TMPFS, MOUNT, "sh", str(tmp_path / "disk")]
    try:
        probe = subprocess.run([*command, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        probe = None
    if probe is None or probe.returncode != 0:
        return  # mounting is not allowed here; test_full_disk.py has a stand-in
    command += [sys.executable, "-m", "tests.guarantees.fill_disk", str(tmp_path), str(DISKS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    print("\n" + done.stdout)
