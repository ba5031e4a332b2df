"""Parts of merges that are refused or cannot be: too early, damaged, of other merges, where nothing can be written."""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.checkpoints import llama, llama_config, pymerge, tree, write_config, write_models
from tests.helpers.parts import Scene, check_not_yet, make_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    return make_scenes(tmp_path_factory.mktemp("parts"))


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
    assert f"missing 1 of 8 files, {shard} among them; run part 2/2 (again)" in done.errors[0]
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


def test_another_merge_that_is_finished_is_named(scenes: dict[str, Scene], tmp_path: Path) -> None:
    scene, out = scenes["linear"], tmp_path / "out"
    assert scene.merge(out).code == 0
    for done in (
        scenes["wudi"].finalize(out),
        scenes["wudi"].merge(out, "--part", "1/2"),
        pymerge("finalize", scene.config, out),  # with files of another size
    ):
        assert done.code == 8
        assert re.search(
            "holds a finished merge, which differs in: (config|output files).*or delete it", done.errors[0]
        )
    assert tree(out) == scene.expected


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


def test_a_part_for_which_the_output_is_read_only_leaves_it_as_it_is(scenes: dict[str, Scene], tmp_path: Path) -> None:
    """As on a machine that has mounted the file system without the right to write."""
    scene, out, seen = scenes["linear"], tmp_path / "out", tmp_path / "seen"
    assert scene.merge(out, "--part", "1/2").code == 0
    before = tree(out)
    seen.mkdir()
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount --bind "$1" "$2" && mount -o remount,bind,ro "$2"'
    if subprocess.run([*alone, mount, "sh", out, seen], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    for command in (["merge", "--part", "2/2"], ["finalize"]):
        pymerge_there = [sys.executable, "-m", "pymerge", command[0], scene.config, seen, *scene.more, *command[1:]]
        done = subprocess.run(
            [*alone, f'{mount} && shift 2 && exec "$@"', "sh", out, seen, *pymerge_there],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 8, done
        assert "lock: creating the lock failed (Read-only file system); check the directory" in done.stderr
        assert tree(out) == before
    assert scene.merge(out, "--part", "2/2", "--finalize").code == 0
    assert tree(out) == scene.expected
