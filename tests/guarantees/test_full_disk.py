"""A disk or a limit that is full: refused before writing where that can be known, cleaned up where not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pymerge.errors import OutputError
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import layout_shards

PREPARE = """
import os, resource, sys
import torch
from pymerge.output.layout import layout_shards
from pymerge.output.directory import OutputDirectory
from pymerge.errors import OutputError
layouts = layout_shards([("a", "U8", (100_000,)), ("b", "U8", (600_000,))], 100_000)
output = OutputDirectory(sys.argv[1] + "/out", layouts, identity={"config": "f"}).open()
output.write("a", torch.zeros(100_000, dtype=torch.uint8))
"""
REPORT = """
try:
    output.write("b", torch.zeros(600_000, dtype=torch.uint8))
except OutputError as error:
    print(error)
    print(sorted(os.listdir(sys.argv[1] + "/out/.pymerge")))
    output.abandon()
"""
SHARD = "model-00001-of-00002.safetensors"
LEFT = f"['UNFINISHED.txt', 'lock', '{SHARD}', '{SHARD}.json', 'state.json']"


def run(command: list[str], code: str, folder: Path) -> list[str]:
    done = subprocess.run([*command, code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_more_than_the_disk_holds_is_refused_at_once(tmp_path: Path) -> None:
    layouts = layout_shards([("a", "U8", (2**60,))], 2**62)
    with pytest.raises(OutputError, match=r"not enough space: needs 1,152,\d{3},.* bytes, [\d,]+ bytes free; free"):
        OutputDirectory(tmp_path / "out", layouts, identity={"config": "f"}).open()
    assert os.listdir(tmp_path) == []


def test_a_file_larger_than_the_limit_of_the_process(tmp_path: Path) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))"
    message, left = run([sys.executable, "-c"], PREPARE + limit + REPORT, tmp_path)
    assert "a file of 604," in message
    assert message.endswith("raise the limit, or, for the weights of a model, give a smaller maximum shard size")
    assert left == LEFT


IN_TMPFS = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o size=1m tmpfs "$1" && exec "$2" -c "$3" "$1"'


def can_mount(folder: Path) -> bool:
    try:
        probe = [*IN_TMPFS, MOUNT, "sh", str(folder), sys.executable, ""]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_a_disk_that_fills_up_while_shards_are_written(tmp_path: Path) -> None:
    # A tmpfs of 1 MiB where mounting is allowed; elsewhere the write limit of the process stands in.
    fill = "open(sys.argv[1] + '/other', 'wb').write(bytes(500_000))\n"
    if can_mount(tmp_path):
        done = subprocess.run(
            [*IN_TMPFS, MOUNT, "sh", str(tmp_path), sys.executable, PREPARE + fill + REPORT],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        message, left = done.stdout.splitlines()
        assert "no space left: needs 604," in message
        assert " bytes free; free some space and run the same command again" in message
    else:
        limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))"
        message, left = run([sys.executable, "-c"], PREPARE + limit + REPORT, tmp_path)
        assert "not allowed here" in message
    assert left == LEFT
