"""Commands that are programs of their own: `wemoe`, those of mergekit, and `demo` and `bench` of a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import typer

from pymerge.cli.console import reported
from pymerge.errors import OutputError

# These take their own options, --help among them.
OWN_OPTIONS: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def wemoe(context: typer.Context) -> None:
    """Merged models whose modules mix base and experts for each input: build, info, adapt."""
    with reported():
        from pymerge.cli.wemoe import wemoe_app

        wemoe_app(args=context.args, prog_name="pymerge wemoe")


def mergekit_yaml(context: typer.Context) -> None:
    """Merge CONFIG_FILE into OUT_PATH, with the options of mergekit-yaml."""
    with reported():
        from pymerge.cli.mergekit import yaml_command

        yaml_command(context.args)


def mergekit_multi(context: typer.Context) -> None:
    """Run the merges of CONFIG_FILE, with the options of mergekit-multi."""
    with reported():
        from pymerge.cli.mergekit import multi_command

        multi_command(context.args)


def demo(context: typer.Context) -> None:
    """Merge the example experts by every method and compare them on their tasks (in a checkout only)."""
    _run_module("examples.glyphs.demo", context.args)


def bench(context: typer.Context) -> None:
    """Time every op on every backend that runs here, beside PyTorch (in a checkout only)."""
    _run_module("benchmarks", ["ops", *context.args])


def _run_module(name: str, arguments: list[str]) -> NoReturn:
    """Run a module of the checkout that is no part of the installation, in the folder where the user is."""
    with reported():
        root = Path(__file__).resolve().parents[2]
        folder = root / name.split(".")[0]
        if not folder.is_dir():
            raise OutputError(f"{name} is not installed ({folder} is missing); clone the repository for it")
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Not a module of that name in the working directory.
        variables = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", name, *arguments]
        raise SystemExit(subprocess.run(command, check=False, env=variables).returncode)
