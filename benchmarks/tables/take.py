"""Takes a run into benchmarks/results, where what README.md and the docs quote comes from.

    python -m benchmarks tables take FILE [--suite SUITE] [--run NAME]

FILE is one of benchmarks/runs. It goes to results/<machine>/SUITE.json (SUITE: as the run is called) as the run NAME; a
run of that name is replaced. `python -m benchmarks tables` then writes the pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import commands
from benchmarks.harness.results import RESULTS, Content, folder_of, load, save


def take(file: Path, suite: str | None = None, run: str | None = None) -> Path:
    """Put a run into the results; returns the file that holds it now.

    Raises SystemExit if there are several runs and none is named.
    """
    content = load(file)
    suite = suite or re.sub(r"^\d{4}-\d\d-\d\d-", "", file.stem)
    path = RESULTS / folder_of(content["machine"]) / f"{suite}.json"
    runs: dict[str, Content] = json.loads(path.read_text())["runs"] if path.exists() else {}
    if run is None and len(runs) > 1:
        raise SystemExit(f"{path} has the runs {', '.join(runs)}; say with --run which one this is")
    runs[run or next(iter(runs), suite)] = content
    save(path, {"runs": runs})
    return path


def main(arguments: Sequence[str]) -> None:
    """Take one file."""
    parser = commands.parser("benchmarks.tables.take", __doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--suite", help="name of the results file")
    parser.add_argument("--run", metavar="NAME", help="which of its runs this is")
    options = parser.parse_args(arguments)
    print(f"kept in {take(options.file, options.suite, options.run)}; now `python -m benchmarks tables`")
