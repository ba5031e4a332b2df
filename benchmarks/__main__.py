"""`python -m benchmarks SUITE [COMMAND] ...`: what there is, and the start of it."""

from __future__ import annotations

import importlib
import sys

from benchmarks.harness.commands import SUITES, overview


def main(words: list[str]) -> None:
    """Run the command that the words begin with; SystemExit with what there is if they name none."""
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return
    suite, *rest = words
    if suite not in SUITES:
        raise SystemExit(f"unknown suite {suite!r}\n\n{overview()}")
    name = rest.pop(0) if rest and rest[0] in SUITES[suite] else ""
    try:
        module = importlib.import_module(SUITES[suite][name].module)
    except ModuleNotFoundError as error:
        needed = "pip install -c constraints.txt '.[plots,test,transformers]'"
        raise SystemExit(f"{suite} {name} needs {error.name}, which is not installed: {needed}") from error
    module.main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
