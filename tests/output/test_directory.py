"""Output directories: written, killed, resumed, refused, and what is left on disk each time."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pymerge.checkpoint.checkpoint import open_checkpoint
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import bytes_of, torch_dtype
from pymerge.errors import CheckpointError, OutputError
from pymerge.output.directory import OutputDirectory
from pymerge.output.manifest import build_manifest, read_manifest
from tests.helpers.checkpoints import OF_TENSORS
from tests.helpers.outputs import SMALL, Tensors, finish, plan, tree, write_shard


def make_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(7)
    tensors: Tensors = {}
    for code, dtype in ((code, torch_dtype(code)) for code in OF_TENSORS):
        raw = torch.randint(0, 2 if code == "BOOL" else 256, (12 * dtype.itemsize,), generator=generator)
        tensors[f"{code}.matrix"] = raw.to(torch.uint8).view(dtype).reshape(4, 3)
        tensors[f"{code}.scalar"] = tensors[f"{code}.matrix"][1, 1].clone()
        tensors[f"{code}.empty"] = torch.empty(0, 2, dtype=dtype)
    return tensors


def assert_holds(folder: Path, tensors: Tensors) -> None:
    """Exactly these tensors, bit for bit, for our reader and for the safetensors library."""
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == set(tensors)
    with Reader(checkpoint.stamps) as reader:
        for name, entry in checkpoint.tensors.items():
            oracle = load_file(entry.file)[name]
            for found in (oracle, reader.read(entry)):
                assert (found.dtype, found.shape) == (tensors[name].dtype, tensors[name].shape)
                assert bytes(bytes_of(found)) == bytes(bytes_of(tensors[name]))


TENSORS = make_tensors()


@pytest.mark.parametrize("limit", [10**9, 200, 1])
def test_every_dtype_round_trips(limit: int, tmp_path: Path) -> None:
    layouts = plan(TENSORS, limit)
    with OutputDirectory(tmp_path / "deep" / "out", layouts, identity={"config": "f"}) as output:
        finish(output, TENSORS)
    folder = tmp_path / "deep" / "out"
    assert_holds(folder, TENSORS)
    index = {"model.safetensors.index.json"} if len(layouts) > 1 else set()
    expected = {layout.file for layout in layouts} | index | {"config.json", "pymerge_manifest.json"}
    assert set(tree(folder)) == expected
    for layout in layouts:
        assert (folder / layout.file).stat().st_size == layout.nbytes


def test_same_bytes_for_any_order_and_piece_size(tmp_path: Path) -> None:
    layouts = plan(TENSORS, 150)
    with OutputDirectory(tmp_path / "a", layouts, identity={"config": "f"}) as output:
        finish(output, TENSORS)
    with OutputDirectory(tmp_path / "b", layouts, identity={"config": "f"}) as output:
        pieces = []
        for name, tensor in reversed(TENSORS.items()):
            raw = bytes(bytes_of(tensor))
            pieces.append([(name, memoryview(raw[i : i + 5])) for i in range(0, len(raw), 5)])
        while any(pieces):  # one piece of each tensor in turn
            for waiting in pieces:
                if waiting:
                    output.write(*waiting.pop(0))
        assert output.finished == {layout.file for layout in layouts}
        finish(output, TENSORS)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_row_blocks_transposed_and_typed_views_are_written_as_they_read(tmp_path: Path) -> None:
    matrix = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    tensors = {"x": matrix.t().contiguous(), "y": torch.arange(4, dtype=torch.int64)}
    with OutputDirectory(tmp_path / "out", plan(tensors, 10**6), identity={"config": "f"}) as output:
        output.write("x", matrix.t()[:2])
        output.write("x", matrix.t()[2:])
        output.write("y", tensors["y"].numpy().data)
        finish(output, tensors)
    assert_holds(tmp_path / "out", tensors)


def _unsupported(*_arguments: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "not supported")


@pytest.mark.parametrize("how", ["unsupported", "absent"])
def test_file_systems_without_preallocation(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "unsupported":
        monkeypatch.setattr(os, "posix_fallocate", _unsupported)
    else:
        monkeypatch.delattr(os, "posix_fallocate")
    with OutputDirectory(tmp_path, plan(TENSORS, 200), identity={"config": "f"}) as output:
        finish(output, TENSORS)
    assert_holds(tmp_path, TENSORS)


def test_checksums_are_those_of_the_tensors(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out", plan(TENSORS, 300), identity={"config": "f"}) as output:
        for layout in output.layouts:
            if layout.file not in output.finished:
                write_shard(output, layout, TENSORS)
        digests = {name: digest for shard in output.checksums.values() for name, digest in shard.items()}
    assert digests == {n: hashlib.sha256(bytes(bytes_of(t))).hexdigest() for n, t in TENSORS.items()}


def test_nothing_looks_like_a_model_before_publish(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "out", plan(SMALL, 80), identity={"config": "f"}) as output:
        write_shard(output, output.layouts[0], SMALL)
        assert os.listdir(tmp_path / "out") == [".pymerge"]
        with pytest.raises(CheckpointError, match="has no weights"):
            open_checkpoint(tmp_path / "out")
        with pytest.raises(OutputError, match=r"internal error: .*1 shards are unfinished"):
            output.publish({}, {})


def test_an_abandoned_run_without_finished_shards_leaves_nothing(tmp_path: Path) -> None:
    with OutputDirectory(tmp_path / "a" / "b", plan(SMALL, 80), identity={"config": "f"}) as output:
        output.write("a", SMALL["a"])
        assert list((tmp_path / "a" / "b" / ".pymerge").glob(f"{output.layouts[0].file}.*.partial"))
    assert os.listdir(tmp_path) == []
    (tmp_path / "given").mkdir()
    with OutputDirectory(tmp_path / "given", plan(SMALL, 80), identity={"config": "f"}) as output:
        output.write("a", SMALL["a"])
    assert os.listdir(tmp_path / "given") == []


def test_a_signal_behind_the_removal_of_the_work_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the lock is closed, and before that is noted."""

    def interrupted(output: OutputDirectory) -> None:
        assert output._lock is not None
        output._lock.close()
        monkeypatch.undo()
        raise KeyboardInterrupt

    output = OutputDirectory(tmp_path / "out", plan(SMALL, 80), identity={"config": "f"}).open()
    monkeypatch.setattr(OutputDirectory, "_release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finish(output, SMALL)
    output.abandon()
    assert not (tmp_path / "out" / ".pymerge").exists()
    assert_holds(tmp_path / "out", SMALL)


def test_pieces_that_do_not_fit_the_plan_are_internal_errors(tmp_path: Path) -> None:
    layouts = plan(SMALL, 80)
    closed = OutputDirectory(tmp_path / "out", layouts, identity={"config": "f"})
    with pytest.raises(OutputError, match="is not open"):
        closed.write("a", SMALL["a"])
    with OutputDirectory(tmp_path / "out", layouts, identity={"config": "f"}) as output:
        for name, data, reason in (
            ("z", SMALL["a"], "not in the plan"),
            ("a", SMALL["a"].half(), "planned F32 on cpu"),
            ("a", torch.ones(10, device="meta"), "planned F32 on cpu"),
            ("a", torch.ones(11), "44 bytes for tensor a, which has 40"),
        ):
            with pytest.raises(OutputError, match=f"internal error: .*{reason}.*please report"):
                output.write(name, data)
        assert output.finished == frozenset()


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("../x", b"", "no relative file name"),
        ("/x", b"", "no relative file name"),
        (".pymerge/x", b"", "no relative file name"),
        ("a//b", b"", "no relative file name"),
        ("pymerge_manifest.json", b"", "would replace"),
        ("model-00001-of-00004.safetensors", b"", "would replace"),
        ("model.safetensors.index.json", b"", "would replace"),
        ("README.md", Path(__file__), "would replace"),
        ("config.json", Path(__file__), "would replace"),
    ],
)
def test_names_that_cannot_be_published(name: str, source: bytes | Path, reason: str, tmp_path: Path) -> None:
    with OutputDirectory(tmp_path, plan(SMALL, 40), identity={"config": "f"}) as output:
        for layout in output.layouts:
            write_shard(output, layout, SMALL)
        with pytest.raises(OutputError, match=reason):
            output.publish({name: source}, {})
        assert os.listdir(tmp_path) == [".pymerge"]
        finish(output, SMALL)
    assert_holds(tmp_path, SMALL)


def test_a_copied_file_that_changed_meanwhile(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer.json"
    source.write_text("old")
    layouts = plan(SMALL, 40)
    with OutputDirectory(tmp_path / "out", layouts, identity={"config": "f"}) as output:
        for layout in layouts:
            write_shard(output, layout, SMALL)
        files: dict[str, bytes | Path] = {"tokenizer.json": source}
        manifest = build_manifest(
            layouts, output.checksums, files, identity={"config": "f"}, recipe={}, base_parameters=40
        )
        source.write_text("new")
        with pytest.raises(CheckpointError, match=r"tokenizer.json: changed while the merge ran"):
            output.publish(files, manifest)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert read_manifest(tmp_path / "out") is None
    with OutputDirectory(tmp_path / "out", layouts, identity={"config": "f"}) as output:
        finish(output, SMALL, files)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"


def test_the_model_file_appears_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace = os.replace

    def recorded(source: Path, target: Path) -> None:
        order.append(str(Path(target).relative_to(tmp_path)))
        replace(source, target)

    for limit, expected in (
        (10**6, ["a.txt", "z.txt", "config.json", "pymerge_manifest.json", "model.safetensors"]),
        (
            80,
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "a.txt",
                "z.txt",
                "config.json",
                "pymerge_manifest.json",
                "model.safetensors.index.json",
            ],
        ),
    ):
        with OutputDirectory(tmp_path / str(limit), plan(SMALL, limit), identity={"config": "f"}) as output:
            for layout in output.layouts:
                write_shard(output, layout, SMALL)
            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", recorded)
                order.clear()
                finish(output, SMALL, {"z.txt": b"", "config.json": b"{}", "a.txt": b""})
        prefix = f"{limit}/"
        assert [n.removeprefix(prefix) for n in order if not n.startswith(prefix + ".pymerge")] == expected
