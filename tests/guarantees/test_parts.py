"""Merges in parts, by processes one after another and at once, killed and damaged: the bytes of one merge."""

from __future__ import annotations

import functools
import json
import os
import random
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch

from pymerge import api
from pymerge.planner.parts import assign
from tests.helpers.checkpoints import (
    CARRIED,
    Done,
    Running,
    llama,
    llama_config,
    pymerge,
    start,
    tree,
    write_config,
    write_model,
    write_models,
)

FULL = bool(os.environ.get("PYMERGE_TORTURE"))
SIZE = ("--max-shard-size", "4KB")


@dataclass(frozen=True)
class Scene:
    """A config, the arguments of its merge, and what one merge writes."""

    config: Path
    more: tuple[str, ...]
    expected: dict[str, bytes]

    def merge(self, out: Path, *more: str) -> Done:
        return pymerge("merge", self.config, out, *self.more, *more)

    def start(self, out: Path, *more: str) -> Running:
        return start("merge", self.config, out, *self.more, *more)

    def finalize(self, out: Path, *more: str) -> Done:
        return pymerge("finalize", self.config, out, *self.more, *more)

    def files(self, count: int) -> list[list[str]]:
        return assign(api.plan(self.config, max_shard_size=self.more[1]), count)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    """wudi, linear, and a ties whose tensors decide together; of a model with files that are carried over."""
    folder = tmp_path_factory.mktemp("parts")
    base = llama()
    write_models(folder, base, config=llama_config(base))
    write_model(folder / "base", base, config=llama_config(base), files=CARRIED)
    parameters: dict[str, dict[str, object]] = {"wudi": {"iterations": 30}, "linear": {}}
    parameters["ties"] = {"weight": 1.0, "density": 0.5, "scope": "model"}
    found = {}
    for method, values in parameters.items():
        config = write_config(folder, method, **values).rename(folder / f"{method}.yml")
        done = pymerge("merge", config, folder / method, *SIZE)
        assert done.code == 0, done
        found[method] = Scene(config, SIZE, tree(folder / method))
    return found


def check_not_yet(out: Path) -> None:
    """Nothing that is there can be taken for a model."""
    assert os.listdir(out) == [".pymerge"]
    done = pymerge("verify", out)
    assert done.code == 8
    assert "is an unfinished merge" in done.errors[0]


@pytest.mark.parametrize(("method", "count"), [("wudi", 3), ("linear", 1), ("ties", 2)])
def test_parts_one_after_another(scenes: dict[str, Scene], tmp_path: Path, method: str, count: int) -> None:
    scene, out = scenes[method], tmp_path / "out"
    for number in range(count, 0, -1):
        done = scene.merge(out, "--part", f"{number}/{count}")
        assert done.code == 0, done
        check_not_yet(out)
    done = scene.finalize(out)
    assert done.code == 0, done
    assert "published 8 files (21 tensors, 5,456 parameters)" in done.out
    assert tree(out) == scene.expected
    done = scene.finalize(out)
    assert done.code == 0, done
    assert "holds this very merge already; verified 21 tensors" in done.out


@pytest.mark.parametrize("count", [3, 11])
def test_parts_at_once_and_the_last_one_makes_the_model(scenes: dict[str, Scene], tmp_path: Path, count: int) -> None:
    scene, out = scenes["linear"], tmp_path / "out"
    running = [scene.start(out, "--part", f"{number}/{count}", "--finalize") for number in range(1, count + 1)]
    ended = [each.wait() for each in running]
    assert {done.code for done in ended} <= {0, 3}, ended
    assert any(done.code == 0 for done in ended), ended
    assert tree(out) == scene.expected


def test_two_processes_with_the_same_part(scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene, out = scenes["wudi"], tmp_path / "out"
    for number in (1, 2):
        twins = [scene.start(out, "--part", f"{number}/2") for _ in range(2)]
        ended = [each.wait() for each in twins]
        assert [done.code for done in ended] == [0, 0], ended
    assert scene.finalize(out).code == 0
    assert tree(out) == scene.expected


def test_a_merge_goes_on_with_parts_and_parts_with_a_merge(scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene, out = scenes["linear"], tmp_path / "out"
    assert scene.merge(out, "--part", "2/3").code == 0
    made = len(scene.files(3)[1])
    done = scene.merge(out)
    assert done.code == 0, done
    assert f"kept {made} finished shards of an interrupted run" in done.out
    assert tree(out) == scene.expected

    out = tmp_path / "other"
    assert scene.merge(out, "--part", "1/1").code == 0  # as a merge that was killed before it published anything
    state = out / ".pymerge/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "parts": 0}))
    file = scene.files(2)[0][0]
    (out / ".pymerge" / f"{file}.json").unlink()
    done = scene.finalize(out)
    assert "1 of 8 files are missing" in done.errors[0]
    assert "run pymerge merge CONFIG OUT, which makes them" in done.errors[0]
    done = scene.merge(out, "--part", "1/2")
    assert done.code == 0, done
    assert "all files are there" in done.out
    assert scene.finalize(out).code == 0
    assert tree(out) == scene.expected


def test_finalize_lists_the_parts_that_are_to_run(scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene, out = scenes["linear"], tmp_path / "out"
    done = scene.finalize(out)
    assert done.code == 8
    assert "holds no part of a merge; run the parts first" in done.errors[0]
    assert not out.exists()
    assert scene.merge(out, "--part", "2/4").code == 0
    done = scene.finalize(out)
    assert done.code == 8
    assert "run parts 1/4, 3/4, 4/4 (again), then finalize: pymerge merge CONFIG OUT --part 1/4" in done.errors[0]
    check_not_yet(out)
    done = scene.merge(out, "--part", "1/4", "--finalize")
    assert done.code == 3, done
    assert done.errors == []


@pytest.mark.parametrize("damage", ["cut", "bit", "foreign", "garbage"])
def test_what_is_damaged_is_made_again(scenes: dict[str, Scene], tmp_path: Path, damage: str) -> None:
    scene, out = scenes["linear"], tmp_path / "out"
    for number in (1, 2):
        assert scene.merge(out, "--part", f"{number}/2").code == 0
    shard = scene.files(2)[1][0]
    file, record = out / ".pymerge" / shard, out / ".pymerge" / f"{shard}.json"
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "bit":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "foreign":
        record.write_text(json.dumps({**json.loads(record.read_text()), "identity": "0" * 64}))
    else:
        record.write_text("{")
    done = scene.finalize(out, *(["--verify"] if damage == "bit" else []))
    assert done.code == 8
    assert f"1 of 8 files are missing, {shard} among them; run part 2/2 (again)" in done.errors[0]
    assert scene.merge(out, "--part", "2/2").code == 0
    assert scene.finalize(out).code == 0
    assert tree(out) == scene.expected


def test_files_of_several_machines_are_read_again(scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene, out = scenes["linear"], tmp_path / "out"
    assert scene.merge(out, "--part", "1/1").code == 0
    record = next((out / ".pymerge").glob("*.safetensors.json"))
    record.write_text(json.dumps({**json.loads(record.read_text()), "host": "elsewhere"}))
    shard = out / ".pymerge" / record.name.removesuffix(".json")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = scene.finalize(out)
    assert done.code == 8
    assert "run part 1/1 (again)" in done.errors[0]


def test_other_merges_are_refused(scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene, out = scenes["linear"], tmp_path / "out"
    assert scene.merge(out, "--part", "1/2").code == 0
    before = tree(out)
    for done, reason in (
        (scenes["wudi"].merge(out, "--part", "2/2"), "differs in: config "),
        (scenes["wudi"].finalize(out), "differs in: config "),
        (scene.merge(out, "--part", "2/2", "--max-shard-size", "8KB"), "differs in: output files"),
        (pymerge("finalize", scene.config, out, "--max-shard-size", "8KB"), "differs in: output files"),
        (scene.merge(out, "--part", "2/2", "--overwrite"), "a part does not replace another merge"),
    ):
        assert done.code in (5, 8), done
        assert reason in done.errors[0], done
        assert tree(out) == before


def test_a_part_of_another_processor_or_version_is_named(scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene, out = scenes["wudi"], tmp_path / "out"
    assert scene.merge(out, "--part", "1/2").code == 0
    state = out / ".pymerge/state.json"
    raw = json.loads(state.read_text())
    for part, was in (("processor", "x86_64 NONE"), ("torch version", "1.0")):
        now = raw["identity"][part]
        state.write_text(json.dumps({**raw, "identity": {**raw["identity"], part: was}}))
        done = scene.merge(out, "--part", "2/2")
        assert done.code == 8
        assert f"differs in: {part} (was {was}, is {now}); run all parts with the same config" in done.errors[0]
        assert "on machines of one kind" in done.errors[0]


@pytest.mark.parametrize("part", ["0/2", "3/2", "1/0", "1", "a/b", "-1/2", "1/2/3", ""])
def test_a_part_that_does_not_exist_makes_no_folder(scenes: dict[str, Scene], tmp_path: Path, part: str) -> None:
    done = scenes["linear"].merge(tmp_path / "out", f"--part={part}")
    assert done.code == 5, done
    assert "part " in done.errors[0]
    assert not (tmp_path / "out").exists()


def test_a_changed_input_is_told(scenes: dict[str, Scene], tmp_path: Path) -> None:
    base = llama()
    config = write_config(write_models(tmp_path, base, config=llama_config(base)), "linear")
    assert pymerge("merge", config, tmp_path / "out", "--part", "1/2").code == 0
    os.utime(tmp_path / "e0/model.safetensors", ns=(1, 1))
    for done in (
        pymerge("merge", config, tmp_path / "out", "--part", "2/2"),
        pymerge("finalize", config, tmp_path / "out"),
    ):
        assert done.code == 8
        assert "e0/model.safetensors (was" in done.errors[0]


@pytest.fixture(scope="module")
def slow_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A merge of 9 files that takes a second or more."""
    folder = tmp_path_factory.mktemp("slow")
    base = {f"model.layers.{number:02d}.mlp.up_proj.weight": torch.eye(96) for number in range(9)}
    write_models(folder, base, config={"model_type": "x"})
    config = write_config(folder, "wudi", iterations=600)
    more = ("--max-shard-size", "30KB")
    assert pymerge("merge", config, folder / "out", *more).code == 0
    return Scene(config, more, tree(folder / "out"))


def records(out: Path) -> int:
    return len(list((out / ".pymerge").glob("*.safetensors.json")))


def test_a_part_that_runs_keeps_others_than_parts_out(slow_scene: Scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = slow_scene.start(out, "--part", "1/2")
    running.wait_until(lambda: records(out) >= 1)
    running.send(signal.SIGSTOP)
    for done in (slow_scene.merge(out), slow_scene.merge(out, "--overwrite"), slow_scene.finalize(out)):
        assert done.code == 8
        assert "another pymerge run is writing here" in done.errors[0]
    done = slow_scene.merge(out, "--part", "2/2", "--finalize")
    assert done.code == 3, done
    running.send(signal.SIGCONT)
    assert running.wait().code == 0
    assert slow_scene.finalize(out).code == 0
    assert tree(out) == slow_scene.expected


def test_what_a_killed_part_has_left_is_removed(slow_scene: Scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = slow_scene.start(out, "--part", "1/2")
    running.wait_until(lambda: bool(list((out / ".pymerge").glob("model*.partial"))) or records(out) == 5)
    running.send(signal.SIGSTOP)
    pid = running._process.pid
    running.wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    left = {file.name for file in (out / ".pymerge").glob("model*.partial")}
    assert slow_scene.merge(out, "--part", "1/2").code == 0
    assert {file.name for file in (out / ".pymerge").glob("model*.partial")} == left, "it is still being written"
    running.send(signal.SIGKILL)
    running.wait()
    for file in left:
        (out / ".pymerge" / f"{file.split('.safetensors')[0]}.safetensors.json").unlink()
    assert slow_scene.merge(out, "--part", "1/2").code == 0
    assert not list((out / ".pymerge").glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_parts_stopped_anywhere(slow_scene: Scene, tmp_path: Path, number: signal.Signals) -> None:
    """Three processes at once, stopped at random moments and started again until each is done; then one finalizes."""
    generator = random.Random(number.value)
    for trial in range(40 if FULL else 4):
        out = tmp_path / str(trial)
        waiting = [1, 2, 3]
        stops = 0
        while waiting:
            running = {part: slow_scene.start(out, "--part", f"{part}/3") for part in waiting}
            for each in running.values():
                if stops < 9 and generator.random() < 0.8:
                    each.send_after(generator.uniform(0.05, 1.5), number)
            for part, each in running.items():
                done = each.wait()
                assert "Traceback" not in done.err, done
                if done.code == 0:
                    waiting.remove(part)
                else:
                    assert done.code in ({-number} if number == signal.SIGKILL else {-number, 143}), done
                    stops += 1
        running_finalize = start("finalize", slow_scene.config, out, *slow_scene.more)
        running_finalize.send_after(generator.uniform(0.05, 0.6), number)
        running_finalize.wait()
        done = slow_scene.finalize(out)
        assert done.code == 0, done
        assert tree(out) == slow_scene.expected


def test_a_part_that_cannot_write_leaves_the_others_alone(scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene, out = scenes["linear"], tmp_path / "out"
    assert scene.merge(out, "--part", "1/2").code == 0
    before = tree(out)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (6000, 6000))
    done = pymerge("merge", scene.config, out, *scene.more, "--part", "2/2", before=limit)
    assert done.code == 8, done
    assert len(done.errors) == 1
    assert "is not allowed here" in done.errors[0]
    changed = {name for name, data in tree(out).items() if before.get(name) != data}
    assert changed == set(), "what the other part has written is kept, and nothing half written is added"
    assert scene.merge(out, "--part", "2/2", "--finalize").code == 0
    assert tree(out) == scene.expected
