"""Merges in parts, by processes one after another and at once, killed and damaged: the bytes of one merge."""

from __future__ import annotations

import json
import os
import random
import signal
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from pymerge import api
from pymerge.cli.finalize import finalized
from pymerge.output.part import PartDirectory
from tests.helpers.checkpoints import (
    pymerge,
    start,
    tree,
    write_config,
    write_models,
)
from tests.helpers.parts import SIZE, Scene, check_not_yet, make_scenes

FULL = bool(os.environ.get("PYMERGE_TORTURE"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    return make_scenes(tmp_path_factory.mktemp("parts"))


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
    assert [done for done in ended if done.code not in {0, 3}] == []
    assert any(done.code == 0 for done in ended), ended
    assert tree(out) == scene.expected


def test_a_part_that_ends_while_the_last_one_would_publish_publishes(
    scenes: dict[str, Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two is at its end, but has its lock, when the other has written its files: one must make the model."""
    scene, out = scenes["linear"], tmp_path / "out"
    abandon, others = PartDirectory.abandon, []

    def wait_for_the_other(directory: PartDirectory) -> None:
        if not others:
            assert directory.missing
            others.append(scene.merge(out, "--part", "2/2", "--finalize"))
        abandon(directory)

    monkeypatch.setattr(PartDirectory, "abandon", wait_for_the_other)
    planned = api.plan(scene.config, max_shard_size=SIZE[1])
    report = api.run(planned, out, part=(1, 2), progress=False)
    assert others[0].code == 3, "the lock was held"
    assert report.missing_files == 0
    assert finalized(planned, out, report, quiet=True)
    assert tree(out) == scene.expected


def test_a_part_that_begins_while_others_publish_has_nothing_to_do(
    scenes: dict[str, Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others end between its look at the directory and its lock."""
    scene, out = scenes["linear"], tmp_path / "out"
    opened = PartDirectory.open

    def after_the_others(directory: PartDirectory) -> PartDirectory:
        assert scene.merge(out, "--part", "1/1", "--finalize").code == 0
        return opened(directory)

    monkeypatch.setattr(PartDirectory, "open", after_the_others)
    planned = api.plan(scene.config, max_shard_size=SIZE[1])
    report = api.run(planned, out, part=(2, 2), progress=False)
    assert report.already_done
    assert report.missing_files == 0
    assert finalized(planned, out, report, quiet=True)
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
    assert "missing 1 of 8 files" in done.errors[0]
    assert "run pymerge merge CONFIG OUT, which makes them" in done.errors[0]
    done = scene.merge(out, "--part", "1/2")
    assert done.code == 0, done
    assert "all files are there" in done.out
    assert scene.finalize(out).code == 0
    assert tree(out) == scene.expected


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


def begun(out: Path) -> set[str]:
    """Unfinished files of the model that are locked: they have their size since. Of others their writer makes new ones
    where they are removed."""
    found = set()
    for file in (out / ".pymerge").glob("model*.partial"):
        with suppress(FileNotFoundError):
            if file.stat().st_size:
                found.add(file.name)
    return found


def test_what_a_killed_part_has_left_is_removed(slow_scene: Scene, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = slow_scene.start(out, "--part", "1/2")
    running.wait_until(lambda: bool(begun(out)) or records(out) == 5)
    running.send(signal.SIGSTOP)
    threads = Path(f"/proc/{running._process.pid}/task")
    # All of them: a thread in a system call ends that first.
    running.wait_until(lambda: all(b") T " in (each / "stat").read_bytes() for each in threads.iterdir()))
    left = begun(out)
    assert slow_scene.merge(out, "--part", "1/2").code == 0
    assert begun(out) == left, "it is still being written"
    running.send(signal.SIGKILL)
    running.wait()
    for file in left:
        (out / ".pymerge" / f"{file.split('.safetensors')[0]}.safetensors.json").unlink()
    assert slow_scene.merge(out, "--part", "1/2").code == 0
    # A small file that was caught before its renaming stays: it goes with the folder.
    assert not list((out / ".pymerge").glob("model*.partial"))


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
