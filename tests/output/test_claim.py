"""Output directories that hold something already: foreign files are kept, --overwrite removes only ours."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pymerge.errors import OutputError
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import layout_shards
from tests.helpers.outputs import SMALL, Tensors, finish, plan, tree, write_shard


def assert_holds(folder: Path, tensors: Tensors) -> None:
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


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


def test_a_file_instead_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for path, reason in (
        (tmp_path / "out", "is a file"),
        (tmp_path / "out" / "deep", "creating the directory"),
    ):
        with pytest.raises(OutputError, match=reason):
            OutputDirectory(path, plan(SMALL, 40), identity={"config": "f"}).open()
    assert tree(tmp_path) == {"out": b"mine"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "folder/file", "model.safetensors", "config.json"])
def test_foreign_files_are_never_touched(name: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=rf"not of this merge: '{name.split('/')[0]}'; choose an empty"):
        OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}, overwrite=overwrite).open()
    assert tree(tmp_path) == before
    assert not (tmp_path / ".pymerge").exists()


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"creating the directory failed \(File name too long\)"):
        OutputDirectory(tmp_path / ("x" * 300), plan(SMALL, 40), identity={}).open()
    assert os.listdir(tmp_path) == []


def test_only_three_foreign_names_are_listed(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / str(number)).touch()
    with pytest.raises(OutputError, match=r"'0', '1', '2' and 1 more; choose"):
        OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}).open()


def unfinished(path: Path, fingerprint: str) -> None:
    layouts = plan(SMALL, 40)
    with OutputDirectory(path, layouts, identity={"config": fingerprint}) as output:
        write_shard(output, layouts[0], SMALL)


def test_an_unfinished_merge_of_something_else(tmp_path: Path) -> None:
    unfinished(tmp_path, "f")
    before = tree(tmp_path)
    for fingerprint, limit in (("g", 40), ("f", 80)):
        with pytest.raises(OutputError, match=r"an unfinished merge of other inputs or parameters.*--overwrite"):
            OutputDirectory(tmp_path, plan(SMALL, limit), identity={"config": fingerprint}).open()
        assert tree(tmp_path) == before
    with OutputDirectory(tmp_path, plan(SMALL, 80), identity={"config": "g"}, overwrite=True) as output:
        assert output.finished == frozenset()
        finish(output, SMALL)
    assert_holds(tmp_path, SMALL)


def test_what_differs_is_named(tmp_path: Path) -> None:
    recorded = {
        "device": "cpu",
        "torch version": "2.5",
        "config scale": "1.0",
        "input /m/a": "1 bytes",
        "old": "x" * 999,
    }
    layouts = plan(SMALL, 40)
    with OutputDirectory(tmp_path, layouts, identity=recorded) as output:
        write_shard(output, layouts[0], SMALL)
    now = recorded | {"torch version": "2.6", "config scale": "0.5"}
    said = (
        f"{tmp_path}: holds an unfinished merge of other inputs or parameters, it differs in: "
        "config scale (was 1.0, is 0.5), torch version (was 2.5, is 2.6); run that command again to finish it, "
        "choose another directory, or give --overwrite to start anew"
    )
    with pytest.raises(OutputError) as caught:
        OutputDirectory(tmp_path, layouts, identity=now).open()
    assert str(caught.value) == said
    with pytest.raises(OutputError, match=r"differs in: config scale \(was 1.0, is absent\), .* and 2 more; run that"):
        OutputDirectory(tmp_path, layouts, identity={"new": "1"}).open()
    with OutputDirectory(tmp_path, layouts, identity=recorded) as output:
        finish(output, SMALL)
    with pytest.raises(OutputError, match=r"holds a finished merge, which differs in: device \(was cpu, is cuda\); ch"):
        OutputDirectory(tmp_path, layouts, identity=recorded | {"device": "cuda"}).open()


def test_a_work_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.pymerge").symlink_to(tmp_path / "elsewhere")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"\.pymerge: is a link; remove it"):
            OutputDirectory(tmp_path / "out", plan(SMALL, 40), identity={}, overwrite=overwrite).open()
    assert os.listdir(tmp_path / "elsewhere") == []


def test_overwrite_resumes_the_same_merge(tmp_path: Path) -> None:
    unfinished(tmp_path, "f")
    with OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}, overwrite=True) as output:
        assert len(output.finished) == 1


def test_overwrite_removes_what_the_manifest_lists_and_nothing_else(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}) as output:
        finish(output, SMALL, FILES)
    with pytest.raises(OutputError, match=r"holds a finished merge; .*--overwrite"):
        OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}).open()
    foreign = tmp_path / "1_Pooling" / "mine.txt"
    foreign.write_text("mine")
    before = tree(tmp_path)
    again = OutputDirectory(tmp_path, plan(SMALL, 10**6), identity={"config": "g"}, overwrite=True)
    with pytest.raises(OutputError, match=r"not of this merge: '1_Pooling/mine\.txt'"):
        again.open()
    assert tree(tmp_path) == before
    foreign.unlink()
    with OutputDirectory(tmp_path, plan(SMALL, 10**6), identity={"config": "g"}, overwrite=True) as output:
        assert os.listdir(tmp_path) == [".pymerge"]
        finish(output, SMALL)
    assert set(tree(tmp_path)) == {"config.json", "model.safetensors", "pymerge_manifest.json"}


def test_an_overwrite_that_cannot_fit_keeps_the_earlier_output(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}) as output:
        finish(output, SMALL)
    before = tree(tmp_path)
    huge = layout_shards([("a", "U8", (2**60,))], 2**62)
    with pytest.raises(OutputError, match="not enough space"):
        OutputDirectory(tmp_path, huge, identity={"config": "g"}, overwrite=True).open()
    with pytest.raises(OutputError, match="not enough space"):  # for files that are to be copied
        OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "g"}, overwrite=True, copied=2**60).open()
    assert tree(tmp_path) == before
    assert not (tmp_path / ".pymerge").exists()


@pytest.mark.parametrize(
    ("earlier", "unlinks"),
    [("finished", n) for n in range(0, 12, 3)] + [("unfinished", n) for n in range(4)],
)
def test_an_overwrite_killed_while_it_removes_can_be_repeated(earlier: str, unlinks: int, tmp_path: Path) -> None:
    if earlier == "finished":
        with OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}) as output:
            finish(output, SMALL, FILES)
    else:
        unfinished(tmp_path, "f")

    def overwrite() -> OutputDirectory:
        return OutputDirectory(tmp_path, plan(SMALL, 80), identity={"config": "g"}, overwrite=True)

    def kill_in_between() -> None:
        left, unlink = unlinks, Path.unlink

        def counted(path: Path, missing_ok: bool = False) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            unlink(path, missing_ok=missing_ok)

        pytest.MonkeyPatch().setattr(Path, "unlink", counted)
        overwrite().open()

    child = in_other_process(kill_in_between)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "model.safetensors.index.json").exists() or unlinks == 0
    with overwrite() as output:
        finish(output, SMALL)
    assert len(tree(tmp_path)) == 5
    assert_holds(tmp_path, SMALL)


def test_foreign_files_in_the_work_folder_are_kept(tmp_path: Path) -> None:
    unfinished(tmp_path, "f")
    (tmp_path / ".pymerge" / "mine").write_text("mine")
    before = tree(tmp_path)
    for fingerprint, overwrite in (("f", False), ("g", True)):
        with pytest.raises(OutputError, match=r"not of this merge: '\.pymerge/mine'"):
            OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": fingerprint}, overwrite=overwrite).open()
        assert tree(tmp_path) == before


def test_a_work_folder_from_before_the_first_state_is_taken(tmp_path: Path) -> None:
    (tmp_path / ".pymerge").mkdir()
    for name in ("lock", "temporary.node.12.0123abcd.partial"):
        (tmp_path / ".pymerge" / name).touch()
    with OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}) as output:
        finish(output, SMALL)
    assert_holds(tmp_path, SMALL)
    assert not (tmp_path / ".pymerge").exists()


def test_a_manifest_cannot_make_us_delete_outside(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out", plan(SMALL, 40), identity={"config": "f"}) as output:
        finish(output, SMALL)
    (tmp_path / "mine").write_text("mine")
    manifest = tmp_path / "out" / "pymerge_manifest.json"
    content = json.loads(manifest.read_text())
    content["files"]["../mine"] = {"size": 4, "sha256": ""}
    manifest.write_text(json.dumps(content))
    with pytest.raises(OutputError, match=r"is damaged .*'../mine' would be outside"):
        OutputDirectory(tmp_path / "out", plan(SMALL, 40), identity={"config": "f"}, overwrite=True).open()
    del content["files"]["../mine"]
    content["files"]["link/mine"] = {"size": 4, "sha256": ""}
    manifest.write_text(json.dumps(content))
    (tmp_path / "out" / "link").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(OutputError, match="not of this merge: 'link'"):
        OutputDirectory(tmp_path / "out", plan(SMALL, 40), identity={"config": "f"}, overwrite=True).open()
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 1}',
        '{"format": 3, "identity": {}}',
        '{"format": 3, "identity": {}, "shards": ["../x"], "parts": 0, "publishing": []}',
        '{"format": 3, "identity": {}, "shards": [], "parts": "x", "publishing": []}',
        '{"format": 3, "identity": {}, "shards": [], "parts": 0, "publishing": "x"}',
        '{"format": 3, "identity": {"a": 1}, "shards": [], "parts": 0, "publishing": []}',
        '{"format": 3, "identity": {}, "shards": 3, "parts": 0, "publishing": []}',
    ],
)
def test_a_damaged_state_is_refused(text: str, tmp_path: Path) -> None:
    unfinished(tmp_path, "f")
    (tmp_path / ".pymerge" / "state.json").write_text(text)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"state.json: is damaged .*delete the folder"):
        OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}).open()
    assert tree(tmp_path) == before
