"""Unfinished output directories: resumed after any kill with the same bytes, refused while in use."""

from __future__ import annotations

import fcntl
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pymerge.errors import OutputError
from pymerge.output.directory import OutputDirectory
from pymerge.output.manifest import read_manifest
from tests.helpers.outputs import SMALL, Tensors, finish, plan, tree, write_shard


def assert_holds(folder: Path, tensors: Tensors) -> None:
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_an_exception_abandons_and_the_next_run_resumes(tmp_path: Path) -> None:
    layouts = plan(SMALL, 40)
    with OutputDirectory(tmp_path / "whole", layouts, identity={"config": "f"}) as output:
        finish(output, SMALL)

    def interrupted() -> None:
        with OutputDirectory(tmp_path / "out", layouts, identity={"config": "f"}) as output:
            write_shard(output, layouts[2], SMALL)
            write_shard(output, layouts[0], SMALL)
            output.write("b", SMALL["b"][:5])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    work = tmp_path / "out" / ".pymerge"
    assert os.listdir(tmp_path / "out") == [".pymerge"]
    kept = {layouts[0].file, layouts[2].file}
    records = {f"{file}.json" for file in kept}
    assert set(os.listdir(work)) == {"lock", "state.json", "UNFINISHED.txt", *kept, *records}
    assert "run the same pymerge command again" in (work / "UNFINISHED.txt").read_text()
    assert read_manifest(tmp_path / "out") is None
    with OutputDirectory(tmp_path / "out", layouts, identity={"config": "f"}) as output:
        assert output.finished == kept
        with pytest.raises(OutputError, match=r"internal error: .*which is finished"):
            output.write("a", SMALL["a"])
        finish(output, SMALL)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def _change_header(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)


def _flip_a_bit_of_a_tensor(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _change_header, _flip_a_bit_of_a_tensor, Path.unlink])
def test_damaged_finished_shards_are_redone(damage: Callable[[Path], None], tmp_path: Path) -> None:
    layouts = plan(SMALL, 40)
    with OutputDirectory(tmp_path / "out", layouts, identity={"config": "f"}) as output:
        write_shard(output, layouts[0], SMALL)
        write_shard(output, layouts[1], SMALL)
    damage(tmp_path / "out" / ".pymerge" / layouts[0].file)
    with OutputDirectory(tmp_path / "out", layouts, identity={"config": "f"}) as output:
        assert output.finished == {layouts[1].file}
        finish(output, SMALL)
    assert_holds(tmp_path / "out", SMALL)


FILES: dict[str, bytes | Path] = {
    "config.json": b"{}\n",
    "README.md": b"# card\n",
    "1_Pooling/config.json": b"[]\n",
    "tokenizer.json": Path(__file__),
}


def in_other_process(work: Callable[[], None]) -> int:
    """Fork and run `work` there; returns the process id. A fork, as importing torch anew takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: other threads may exist
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def kill_at(point: str, out: Path) -> None:
    """Merge SMALL into `out` and stop by SIGKILL, so that no clean-up can run.

    After the second "shard", in the "middle" of the third, before the n-th rename of publishing ("rename:n"),
    or when everything is published and the work folder is to be removed ("cleanup").
    """

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    output = OutputDirectory(out, plan(SMALL, 40), identity={"config": "f"}).open()
    for number, layout in enumerate(output.layouts):
        if point == "middle" and number == 2:
            output.write("c", SMALL["c"][:3])
            die()
        write_shard(output, layout, SMALL)
        if point == "shard" and number == 1:
            die()
    patch = pytest.MonkeyPatch()
    if point == "cleanup":
        patch.setattr(Path, "unlink", lambda *_args, **_options: die())
    else:
        left = int(point.removeprefix("rename:"))
        replace = os.replace

        def counted(source: Path, target: Path) -> None:
            nonlocal left
            if left == 0:
                die()
            left -= 1
            replace(source, target)

        patch.setattr(os, "replace", counted)
    finish(output, SMALL, FILES)


# Renames of publishing: 0 state, 1 to 4 shards, 5 to 7 other files, 8 config, 9 manifest, 10 index.
@pytest.mark.parametrize("point", ["shard", "middle", *(f"rename:{n}" for n in range(11)), "cleanup"])
def test_a_killed_run_gives_the_same_bytes_when_started_again(point: str, tmp_path: Path) -> None:
    child = in_other_process(lambda: kill_at(point, tmp_path / "out"))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert read_manifest(tmp_path / "out") is None, "an unfinished output must not count as finished"
    layouts = plan(SMALL, 40)
    with OutputDirectory(tmp_path / "out", layouts, identity={"config": "f"}) as output:
        assert len(output.finished) == (2 if point in ("shard", "middle") else 4)
        finish(output, SMALL, FILES)
    with OutputDirectory(tmp_path / "whole", layouts, identity={"config": "f"}) as output:
        finish(output, SMALL, FILES)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert_holds(tmp_path / "out", SMALL)


def test_a_shard_damaged_while_publishing_was_interrupted_is_redone(tmp_path: Path) -> None:
    child = in_other_process(lambda: kill_at("rename:9", tmp_path / "out"))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    layouts = plan(SMALL, 40)
    _flip_a_bit_of_a_tensor(tmp_path / "out" / layouts[1].file)
    with OutputDirectory(tmp_path / "out", layouts, identity={"config": "f"}) as output:
        assert output.finished == {layouts[number].file for number in (0, 2, 3)}
        finish(output, SMALL, FILES)
    assert_holds(tmp_path / "out", SMALL)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """Another process that has written two shards and keeps the directory open."""
    readable, writable = os.pipe()

    def hold() -> None:
        output = OutputDirectory(tmp_path / "out", plan(SMALL, 40), identity={"config": "f"}).open()
        write_shard(output, output.layouts[0], SMALL)
        write_shard(output, output.layouts[1], SMALL)
        os.write(writable, b"r")
        signal.pause()

    child = in_other_process(hold)
    assert os.read(readable, 1) == b"r"
    yield child
    os.close(readable)
    os.close(writable)


def test_a_second_run_is_refused_while_the_first_one_writes(holder: int, tmp_path: Path) -> None:
    before = tree(tmp_path / "out")
    for overwrite in (False, True):
        output = OutputDirectory(tmp_path / "out", plan(SMALL, 40), identity={"config": "f"}, overwrite=overwrite)
        with pytest.raises(OutputError, match="another pymerge run is writing here"):
            output.open()
    after = tree(tmp_path / "out")
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert after == before
    with OutputDirectory(tmp_path / "out", plan(SMALL, 40), identity={"config": "f"}) as output:
        assert len(output.finished) == 2


def test_a_lock_whose_file_was_just_removed_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run ends, and removes its lock file, between our open and our flock."""
    flock = fcntl.flock
    lock = tmp_path / ".pymerge" / "lock"
    calls = 0

    def late(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            lock.unlink()
            lock.parent.rmdir()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}) as output:
        assert calls == 2
        with pytest.raises(OutputError, match="another pymerge run"):
            OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}).open()
        finish(output, SMALL)
    assert_holds(tmp_path, SMALL)
