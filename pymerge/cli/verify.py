"""The command `pymerge verify`."""

from __future__ import annotations

import re
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pymerge.cli import options
from pymerge.cli.console import print_lines, print_warnings, reported, tensor_count
from pymerge.common.events import event, recording
from pymerge.errors import OutputError

_DEEP = "16"  # tensors that `verify --deep` computes


class VerifyCommand(TyperCommand):
    """The command with a value of --deep added where none is given, which Typer's options cannot express."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        filled: list[str] = []
        for argument, following in zip_longest(args, args[1:], fillvalue=""):
            filled.append(argument)
            if argument == "--deep" and not re.fullmatch("[0-9]+|all", following):
                filled.append(_DEEP)
        return super().parse_args(ctx, filled)


def verify(
    out: Annotated[Path, typer.Argument(help="Directory that `pymerge merge` wrote.", show_default=False)],
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Accept NaN and infinity.")] = False,
    deep: Annotated[
        str | None,
        typer.Option(
            metavar="[N|all]",
            help=f"Compute N tensors ({_DEEP} without a number, or all) again from recipe and inputs, compare bytes.",
            show_default=False,
        ),
    ] = None,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
) -> None:
    """Read a merged model again and compare every byte with its manifest."""
    with reported(), recording(log_json):
        from pymerge.common.progress import NoProgress, ProgressBar
        from pymerge.output.verify import verify as verify_output

        count = None if deep is None else tensor_count("--deep", deep, 1)
        progress = NoProgress() if quiet else ProgressBar("verifying")
        report = verify_output(out, progress=progress, allow_nonfinite=allow_nonfinite)
        lines = [f"{out}: {report.tensors} tensors, {report.parameters:,} parameters, all as written"]
        if deep is not None and not report.problems:
            lines.append(_verify_deep(out, count, report.problems, quiet))
        if report.problems:
            raise OutputError(f"{out} is not as it was written:\n" + "\n".join(f"- {p}" for p in report.problems))
        event("verified", lines[-1], output=out, tensors=report.tensors, parameters=report.parameters)
        if not quiet:
            print_lines(lines)


def _verify_deep(out: Path, count: int | None, problems: list[str], quiet: bool) -> str:
    """Compute tensors again; adds to `problems` and returns the summary."""
    from pymerge.common.progress import NoProgress, ProgressBar
    from pymerge.engine.recheck import recheck

    found = recheck(out, count, progress=NoProgress() if quiet else ProgressBar("computing again"))
    changed = [f"changed since the merge: {change}" for change in found.changes]
    if found.problems:
        problems += found.problems + changed
    elif not quiet:
        print_warnings(tuple(changed))
    text = f"{out}: {len(found.tensors)} tensors computed again, the same bytes"
    event("recomputed", text, tensors=found.tensors, changes=found.changes, problems=found.problems)
    return text
