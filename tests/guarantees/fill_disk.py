"""Merges on a disk that fills up, in a process whose mount of a small disk nobody else sees.

    python -m tests.guarantees.fill_disk FOLDER TIMES

FOLDER/disk is the small disk.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.helpers.checkpoints import Done, checksums, llama, llama_config, pymerge, start, write_config, write_models


def fill_up(folder: Path, disks: int) -> None:
    """Merges on the small disk `folder` that is filled at random moments."""
    generator = random.Random(5)
    models, disk = folder / "models", folder / "disk"
    base = llama(hidden=48, inner=64, vocabulary=96)
    write_models(models, base, config=llama_config(base))
    write_config(models, "linear")
    arguments = ("merge", models / "merge.yml", "--max-shard-size", "20KB")
    assert pymerge(*arguments, models / "warm").code == 0
    expected = checksums(models / "warm")
    size = sum(file.stat().st_size for file in (models / "warm").iterdir())
    full = 0
    for number in range(disks):
        out, filler = disk / "out", disk / "filler"
        part = ("--part", "1/1") if number % 2 else ()  # every second one as a part
        running = start(*arguments, out, *part)
        time.sleep(generator.uniform(0, 0.15))
        status = os.statvfs(disk)
        left = generator.randrange(size)
        with open(filler, "wb") as stream, suppress(OSError):  # the merge may have taken the space since
            os.posix_fallocate(stream.fileno(), 0, max(1, status.f_bavail * status.f_frsize - left))
        done = running.wait()
        assert done.code in (0, 8), done
        if done.code == 8:
            full += 1
            check_message(done, out)
        filler.unlink()
        done = pymerge(*arguments, out, *part)
        assert done.code == 0, done
        if part:
            assert pymerge("finalize", *arguments[1:], out).code == 0
        assert checksums(out) == expected
        subprocess.run(["rm", "-r", str(out)], check=True)
    print(f"full disk: {full} of {disks} merges failed and went on to the same bytes")
    assert full > 0


def check_message(done: Done, out: Path) -> None:
    assert len(done.errors) == 1, done
    assert "space" in done.errors[0], done
    assert not (out / "model.safetensors.index.json").exists()
    if out.exists():
        assert "run the same pymerge command again" in (out / ".pymerge/UNFINISHED.txt").read_text()


if __name__ == "__main__":
    fill_up(Path(sys.argv[1]), int(sys.argv[2]))
