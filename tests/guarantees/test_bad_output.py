"""Output directories that cannot be used, and disks that are full: said in one message, nothing lost."""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pymerge import api
from tests.helpers.checkpoints import (
    llama,
    llama_config,
    load_output,
    pymerge,
    refused,
    tree,
    write_config,
    write_models,
)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with base, e0, e1 and merge.yml (task_arithmetic)."""
    base = llama()
    write_models(tmp_path, base, config=llama_config(base))
    write_config(tmp_path, "task_arithmetic")
    return tmp_path


def top_level(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_of_others_in_the_output_directory(models: Path) -> None:
    (models / "out").mkdir()
    (models / "out/thesis.txt").write_text("mine")
    for args in ((), ("--overwrite",)):
        refused(models, 8, models / "out", "'thesis.txt'", "choose an empty", args=args, existed=True)
        assert tree(models / "out") == {"thesis.txt": b"mine"}


def test_the_output_path_is_a_file(models: Path) -> None:
    (models / "out").write_text("mine")
    for args in ((), ("--overwrite",)):
        refused(models, 8, models / "out", "is a file; give a directory", args=args, existed=True)
    assert (models / "out").read_text() == "mine"


def test_another_merge_is_replaced_only_on_request(models: Path) -> None:
    assert pymerge("merge", models / "merge.yml", models / "fresh", "--max-shard-size", "3KB").code == 0
    write_config(models, "linear")
    assert pymerge("merge", models / "merge.yml", models / "out").code == 0
    before = tree(models / "out")
    write_config(models, "task_arithmetic")
    refused(models, 8, models / "out", "holds a finished merge", "--overwrite", existed=True)
    assert tree(models / "out") == before
    done = pymerge("merge", models / "merge.yml", models / "out", "--max-shard-size", "3KB", "--overwrite")
    assert done.code == 0, done
    assert tree(models / "out") == tree(models / "fresh")


def test_an_input_is_never_overwritten_by_the_output(models: Path) -> None:
    # The base is a merge itself, so that --overwrite would know every file of it as its own.
    assert pymerge("merge", models / "merge.yml", models / "merged").code == 0
    before = tree(models / "merged")
    text = (models / "merge.yml").read_text().replace("base_model: base", "base_model: merged")
    (models / "merge.yml").write_text(text)
    for args in ((), ("--overwrite",)):
        done = pymerge("merge", models / "merge.yml", models / "merged", *args)
        assert tree(models / "merged") == before
        assert done.code != 0
        assert len(done.errors) == 1
        assert str(models / "merged") in done.errors[0]


def test_a_file_larger_than_allowed_keeps_the_finished_shards(tmp_path: Path) -> None:
    # The last of the files is larger than the limit.
    base = {f"{letter}.weight": torch.ones(16, 200) for letter in "abc"} | {"d.weight": torch.ones(200, 200)}
    write_models(tmp_path, base, config={"model_type": "x"})
    config = write_config(tmp_path, "linear")
    args = ("merge", config, tmp_path / "out", "--max-shard-size", "20KB")
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (40_000, 40_000))
    done = pymerge(*args, before=limit)
    assert done.code == 8
    assert len(done.errors) == 1
    assert "model-00004-of-00004.safetensors" in done.errors[0]
    assert "is not allowed here" in done.errors[0]
    assert "smaller maximum shard size" in done.errors[0]
    assert top_level(tmp_path / "out") == {".pymerge"}
    done = pymerge(*args)
    assert done.code == 0, done
    assert "kept 3 finished shards of an interrupted run" in done.out
    assert load_output(tmp_path / "out").keys() == base.keys()


# Mounts a file system of 1 MiB on $1, runs the other arguments, and lists what is in the output directory.
IN_TMPFS = """
mount -t tmpfs -o size=1m tmpfs "$1" || exit 1
shift
"$@"
code=$?
ls -A "$6" | sed "s/^/LEFT /"
exit $code
"""


def full_disk(models: Path) -> subprocess.CompletedProcess[str] | None:
    """Merge into a file system of 1 MiB; None where mounting one is not allowed."""
    disk = models / "disk"
    disk.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    try:
        mount = 'mount -t tmpfs tmpfs "$1"'
        probe = subprocess.run([*unshare, mount, "sh", str(disk)], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    if probe.returncode != 0:
        return None
    command = [sys.executable, "-m", "pymerge", "merge", str(models / "merge.yml"), str(disk / "out")]
    inside = [*unshare, IN_TMPFS, "sh", str(disk), *command]
    return subprocess.run(inside, capture_output=True, text=True, check=False)


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    base = llama(vocabulary=12_000)
    write_models(tmp_path, base, config=llama_config(base))
    write_config(tmp_path, "linear")
    done = full_disk(tmp_path)
    if done is None:
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**20, 2**20))
        found = pymerge("merge", tmp_path / "merge.yml", tmp_path / "out", before=limit)
        assert found.code == 8
        assert "is not allowed here" in found.errors[0]
        assert not (tmp_path / "out").exists()
        return
    assert done.returncode == 8, done
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    needed = api.plan(tmp_path / "merge.yml").bytes_written
    assert f"not enough space: needs {needed:,} bytes" in done.stderr
    assert "free some space or choose another disk" in done.stderr
    assert "LEFT" not in done.stdout


def test_a_disk_that_is_too_small_for_the_tokenizer(tmp_path: Path) -> None:
    base = llama()
    write_models(tmp_path, base, config=llama_config(base))
    (tmp_path / "base/tokenizer.json").write_text(json.dumps({"vocab": "x" * 2_000_000}))
    write_config(tmp_path, "linear")
    done = full_disk(tmp_path)
    if done is None:
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**20, 2**20))
        found = pymerge("merge", tmp_path / "merge.yml", tmp_path / "out", before=limit)
        code, err, left = found.code, found.err, sorted(os.listdir(tmp_path / "out"))
    else:
        code, err = done.returncode, done.stderr
        left = [line.removeprefix("LEFT ") for line in done.stdout.splitlines() if line.startswith("LEFT ")]
    assert code == 8
    assert err.count("error: ") == 1
    assert "space" in err or "not allowed here" in err
    assert "model.safetensors" not in left
    assert "config.json" not in left
