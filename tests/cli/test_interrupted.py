"""Commands stopped by signals, run twice at once, or after another one: what they say, and that they go on."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import (
    CARRIED,
    Running,
    fine_tuned,
    pymerge,
    start,
    tree,
    write_config,
    write_model,
)

SHARDS = 13


@pytest.fixture(scope="module")
def long_merge(tmp_path_factory: pytest.TempPathFactory) -> tuple[str | Path, ...]:
    """Arguments, but for the output, of a wudi merge of 13 shards that takes a second; `unbroken` is one."""
    folder = tmp_path_factory.mktemp("long")
    base = {f"model.layers.{number:02d}.mlp.up_proj.weight": torch.eye(96) for number in range(SHARDS)}
    write_model(folder / "base", base, config={"model_type": "x"}, files=CARRIED)
    for number in range(2):
        write_model(folder / f"e{number}", fine_tuned(base, number))
    config = write_config(folder, "wudi", iterations=800)
    arguments = ("merge", config, "--max-shard-size", "30KB")
    done = pymerge(*arguments, folder / "unbroken")
    assert done.code == 0, done
    return arguments


def finished(out: Path) -> int:
    """How many shards the work folder has records of."""
    return len(list((out / ".pymerge").glob("*.safetensors.json")))


def begin(arguments: tuple[str | Path, ...], out: Path, shards: int) -> Running:
    """Start the merge and return while it is running, with at least so many shards finished."""
    running = start(*arguments, out)
    running.wait_until(lambda: finished(out) >= shards)
    return running


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_merge_goes_on(
    long_merge: tuple[str | Path, ...], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "out"
    running = begin(long_merge, out, 2)
    running.send(number)
    done = running.wait()
    assert done.code == code
    assert "Traceback" not in done.err
    assert os.listdir(out) == [".pymerge"]
    kept = finished(out)
    assert 2 <= kept < SHARDS
    done = pymerge("verify", out)
    assert done.code == 8
    assert "is an unfinished merge; run the same pymerge command again" in done.errors[0]
    done = pymerge(*long_merge, out)
    assert done.code == 0, done
    assert f"kept {kept} finished shards of an interrupted run" in done.out
    assert tree(out) == tree(Path(long_merge[1]).parent / "unbroken")
    assert pymerge("verify", out).code == 0


@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_says_how_to_go_on(
    long_merge: tuple[str | Path, ...], tmp_path: Path, number: signal.Signals, word: str
) -> None:
    running = begin(long_merge, tmp_path / "out", 1)
    running.send(number)
    assert f"{word}; the same command goes on where this one stopped" in running.wait().err


def test_two_merges_into_one_directory(long_merge: tuple[str | Path, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = begin(long_merge, out, 1)
    running.send(signal.SIGSTOP)  # it holds the directory for as long as the others take
    for more in ((), ("--overwrite",)):
        done = pymerge(*long_merge, out, *more)
        assert done.code == 8
        assert "another pymerge run is writing here" in done.errors[0]
    running.send(signal.SIGCONT)
    assert running.wait().code == 0
    assert tree(out) == tree(Path(long_merge[1]).parent / "unbroken")


def test_an_unfinished_merge_is_not_continued_by_another_one(
    long_merge: tuple[str | Path, ...], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    running = begin(long_merge, out, 2)
    running.send(signal.SIGKILL)
    running.wait()
    other = tmp_path / "other.yml"
    text = Path(long_merge[1]).read_text().replace("iterations: 800", "iterations: 1")
    other.write_text(re.sub(r"(base|e\d)$", rf"{Path(long_merge[1]).parent}/\1", text, flags=re.MULTILINE))
    done = pymerge("merge", other, out, "--max-shard-size", "30KB")
    assert done.code == 8
    assert "holds an unfinished merge of other inputs or parameters" in done.errors[0]
    assert "config parameters.iterations (was 800, is 1)" in done.errors[0]
    done = pymerge("merge", other, out, "--max-shard-size", "30KB", "--overwrite")
    assert done.code == 0, done
    assert "interrupted" not in done.out
