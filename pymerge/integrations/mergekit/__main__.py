"""`python -m pymerge.integrations.mergekit COMMAND ...`: mergekit's own commands, with pymerge as their engine."""

from __future__ import annotations

import sys
from importlib import import_module

from pymerge.common.libraries import require
from pymerge.errors import PymergeError
from pymerge.integrations.mergekit import register_methods, replace_engine

# Those of mergekit's commands that merge whole models, and their modules.
COMMANDS = {
    "yaml": "run_yaml",
    "multi": "multimerge",
    "evolve": "evolve",
    "legacy": "legacy",
    "layershuffle": "layershuffle",
}
USAGE = f"usage: python -m pymerge.integrations.mergekit {{{','.join(COMMANDS)}}} ARGS..."


def main(arguments: list[str]) -> None:
    """Run the command that the arguments begin with; errors of pymerge are one line and an exit code."""
    command, *rest = arguments or ["--help"]
    if command not in COMMANDS:
        asked = command in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    try:
        if command == "evolve":
            require("evolve")
        replace_engine()
        register_methods()
        if command == "evolve":
            _start_ray()
        script = import_module(f"mergekit.scripts.{COMMANDS[command]}")
        script.main(args=rest, prog_name=f"python -m pymerge.integrations.mergekit {command}")
    except PymergeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


def _start_ray() -> None:
    """Start Ray with the engine replaced in its workers, too, where evolve merges."""
    import ray

    ray.init(runtime_env={"worker_process_setup_hook": "pymerge.integrations.mergekit.replace_engine"})


if __name__ == "__main__":
    main(sys.argv[1:])
