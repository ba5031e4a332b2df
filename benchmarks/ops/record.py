"""Takes the results of a GPU into pymerge/backends/measured.json, from which `auto` chooses there.

    python -m benchmarks ops record [FILE ...]

Without a file: the last run of `python -m benchmarks ops`. What is recorded is kept in benchmarks/results, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import commands
from benchmarks.harness.results import newest
from benchmarks.tables.take import take
from pymerge.backends import measured
from pymerge.errors import BackendError


def main(arguments: Sequence[str]) -> None:
    """Record the files."""
    parser = commands.parser("benchmarks.ops.record", __doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    for file in parser.parse_args(arguments).files or [newest("ops")]:
        print(record(file))


def record(file: Path) -> str:
    """Record one file; returns what was done. SystemExit if it has nothing for the table."""
    try:
        count = measured.record(file)
    except BackendError as error:
        raise SystemExit(f"{file}: {error}") from error
    return f"{count} cases of {file} recorded; {measured.summary()}; kept in {take(file)}"
