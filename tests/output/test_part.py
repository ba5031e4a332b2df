"""Output directories that several processes share: what each leaves, whoever is first or last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pymerge.errors import OutputError
from pymerge.output.directory import OutputDirectory
from pymerge.output.lock import InUseError
from pymerge.output.part import PartDirectory
from tests.helpers.outputs import SMALL, finish, plan, tree, write_shard

LAYOUTS = plan(SMALL, 40)
FILES = [layout.file for layout in LAYOUTS]
IDENTITY = {"config": "f"}


def part(path: Path, files: list[str], parts: int = 0) -> PartDirectory:
    return PartDirectory(path, LAYOUTS, files, identity=IDENTITY, parts=parts)


def whole(path: Path) -> OutputDirectory:
    return OutputDirectory(path, LAYOUTS, identity=IDENTITY)


def test_two_at_once_and_one_that_publishes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with part(out, FILES[:2], 2) as one, part(out, FILES[2:], 2) as other:
        for layout in (LAYOUTS[0], LAYOUTS[2]):
            write_shard(one if layout.file in FILES[:2] else other, layout, SMALL)
        assert one.missing == other.missing == [FILES[1], FILES[3]]
        write_shard(one, LAYOUTS[1], SMALL)
        with pytest.raises(InUseError, match="another pymerge run is writing here"):
            whole(out).open()
        with pytest.raises(InUseError, match="another pymerge run is writing here"):
            whole(out).adopt()
        write_shard(other, LAYOUTS[3], SMALL)
    with whole(out).adopt() as output:
        assert (output.missing, output.parts) == ([], 2)
        finish(output, SMALL)
    with whole(tmp_path / "one") as output:
        finish(output, SMALL)
    assert tree(out) == tree(tmp_path / "one")


def test_who_has_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    with part(tmp_path / "a/out", FILES) as output:
        output.write("a", SMALL["a"][:5])
    assert os.listdir(tmp_path) == []
    with part(tmp_path / "a/out", FILES) as first:
        write_shard(first, LAYOUTS[0], SMALL)
        with part(tmp_path / "a/out", FILES) as second:
            second.write("b", SMALL["b"][:5])
    kept = {"lock", "state.json", "UNFINISHED.txt", FILES[0]}
    assert set(os.listdir(tmp_path / "a/out/.pymerge")) == {*kept, f"{FILES[0]}.json"}


def test_a_merge_that_runs_keeps_parts_out(tmp_path: Path) -> None:
    with whole(tmp_path), pytest.raises(InUseError, match="another pymerge run is writing here"):
        part(tmp_path, FILES).open()


def test_who_shares_a_directory_takes_it_back(tmp_path: Path) -> None:
    with whole(tmp_path) as output:
        output.share()
        with part(tmp_path, FILES) as other:
            for layout in LAYOUTS:
                write_shard(other, layout, SMALL)
            with pytest.raises(InUseError):
                whole(tmp_path).open()
        output.reclaim()
        assert output.missing == []
        finish(output, SMALL)
    assert not (tmp_path / ".pymerge").exists()


def test_who_shares_a_directory_and_fails_before_anything_is_whole_leaves_nothing(tmp_path: Path) -> None:
    with whole(tmp_path / "out") as output:
        output.share()
    assert os.listdir(tmp_path) == []


def test_the_same_file_by_two(tmp_path: Path) -> None:
    with part(tmp_path, FILES) as one, part(tmp_path, FILES) as other:
        one.write("a", SMALL["a"][:5])
        other.write("a", SMALL["a"])
        one.write("a", SMALL["a"][5:])
        assert one.finished == other.finished == {FILES[0]}
    with whole(tmp_path) as output:
        assert output.finished == {FILES[0]}
        finish(output, SMALL)


def test_another_merge_and_what_is_no_merge(tmp_path: Path) -> None:
    with part(tmp_path, FILES[:1]) as output:
        write_shard(output, LAYOUTS[0], SMALL)
    before = tree(tmp_path)
    for identity, layouts in (({"config": "g"}, LAYOUTS), (IDENTITY, plan(SMALL, 80))):
        with pytest.raises(OutputError, match=r"an unfinished merge of other inputs.*run all parts with the same"):
            PartDirectory(tmp_path, layouts, [], identity=identity).open()
        with pytest.raises(OutputError, match="an unfinished merge of other inputs"):
            OutputDirectory(tmp_path, layouts, identity=identity).adopt()
    (tmp_path / ".pymerge/mine").write_text("")
    with pytest.raises(OutputError, match=r"not of this merge: '\.pymerge/mine'"):
        part(tmp_path, FILES).open()
    (tmp_path / ".pymerge/mine").unlink()
    assert tree(tmp_path) == before
    with pytest.raises(OutputError, match="holds no part of a merge"):
        whole(tmp_path / "nothing").adopt()
    assert not (tmp_path / "nothing").exists()
