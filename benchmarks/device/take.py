"""Takes what a run on a device has brought home into benchmarks/results and into the table that `auto` chooses by.

    python -m benchmarks device take FOLDER

FOLDER has device.json and ops.json of `make gpu`. Then `python -m benchmarks tables` writes README.md's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import commands
from benchmarks.ops.record import record
from benchmarks.tables.take import take
from pymerge.backends import measured


def main(arguments: Sequence[str]) -> None:
    """Take what there is."""
    parser = commands.parser("benchmarks.device.take", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder: Path = parser.parse_args(arguments).folder
    found = {name: folder / f"{name}.json" for name in ("device", "ops")}
    if not any(file.exists() for file in found.values()):
        raise SystemExit(f"{folder} has neither device.json nor ops.json; give the folder of a run of make gpu")
    if found["device"].exists():
        count = measured.record_merges(found["device"])
        print(f"{count} merges recorded; kept in {take(found['device'])}; now `python -m benchmarks tables`")
    if found["ops"].exists():
        print(record(found["ops"]))
