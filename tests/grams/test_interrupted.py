"""Collections that are killed anywhere, or stopped by a full disk, and started again: the same bytes."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pymerge.errors import OutputError
from pymerge.grams.collect import Settings, collect
from tests.helpers.checkpoints import start
from tests.helpers.collected import save_model, write_texts

pytest.importorskip("transformers")
SETTINGS = Settings(256, None, 512, 2, "float32", ())
KILLS = 60 if os.environ.get("PYMERGE_TORTURE") else 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with data."""
    save_model("llama", tmp_path / "model")
    write_texts(tmp_path / "data", 40)
    return tmp_path


def stop_anywhere(
    arguments: tuple[str | Path, ...],
    outs: Callable[[str], Path],
    begun: Callable[[Path], Path],
    result: Callable[[Path], bytes],
    number: signal.Signals,
) -> None:
    """Send a signal at random moments after the work has begun, and run the command again until it ends."""
    straight = outs("straight")
    started = time.monotonic()
    running = start(*arguments, straight)
    running.wait_until(begun(straight).exists)
    begins = time.monotonic() - started
    assert running.wait().code == 0
    ends = time.monotonic() - started
    generator = random.Random(number.value)
    stopped = 0
    for trial in range(3 * KILLS):
        out = outs(f"killed-{number.value}-{trial}")
        for attempt in range(3):
            running = start(*arguments, out)
            if attempt < 2:
                running.send_after(generator.uniform(0.9 * begins, ends), number)
            done = running.wait()
            assert "Traceback" not in done.err, done
            if done.code == 0:
                break
            assert done.code in (-number, 143), done
            assert not out.exists() or not out.is_file()
            stopped += 1
        assert result(out) == result(straight)
        assert not begun(out).exists()
        if stopped >= KILLS:
            return
    raise AssertionError(f"{stopped} of the signals arrived in time")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_collection_stopped_anywhere_has_the_same_bytes(folder: Path, number: signal.Signals) -> None:
    arguments = ("collect", folder / "model", folder / "data", "--batch", "2", "--device", "cpu", "--quiet")
    before = set(folder.iterdir())
    stop_anywhere(
        arguments,
        lambda name: folder / f"{name}.safetensors",
        lambda out: out.with_name(f".{out.stem}.collecting"),
        Path.read_bytes,
        number,
    )
    assert {path.suffix for path in set(folder.iterdir()) - before} == {".safetensors"}


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """No file of this process gets more bytes meanwhile; what it then sees is that of a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_leaves_nothing_half_written(folder: Path) -> None:
    model, data = str(folder / "model"), folder / "data"
    collect(model, data, folder / "straight.safetensors", SETTINGS, device="cpu", progress=False)
    whole = (folder / "straight.safetensors").read_bytes()
    out, work = folder / "out.safetensors", folder / ".out.collecting"
    kept = []
    for limit in (len(whole) // 10, len(whole) - 1):  # at the first block, and where all are put together
        with largest_file(limit), pytest.raises(OutputError):
            collect(model, data, out, SETTINGS, device="cpu", progress=False)
        assert not out.exists()
        assert not list(folder.rglob("*.tmp"))
        kept.append(sorted(path.name for path in work.glob("*.safetensors")))
        assert work.exists() == bool(kept[-1])  # a folder that nobody could go on from is not left
    assert [len(names) for names in kept] == [0, 3]
    collect(model, data, out, SETTINGS, device="cpu", progress=False)
    assert out.read_bytes() == whole
    assert not work.exists()
