"""The command `pymerge finalize`, and what `pymerge merge --part --finalize` does at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pymerge.cli import options
from pymerge.cli.console import print_lines, print_report, reported
from pymerge.common.events import recording

if TYPE_CHECKING:
    from pymerge.engine.report import MergeReport
    from pymerge.planner.plan import Plan

OTHERS_ARE_MISSING = 3  # exit code of a part that is done where others are not


def finalize(
    config: options.Config,
    out: Annotated[Path, typer.Argument(help="Directory that the parts have written.", show_default=False)],
    device: options.Device = "auto",
    backend: options.Backend = None,
    memory: options.Memory = None,
    device_memory: options.DeviceMemory = None,
    max_shard_size: options.ShardSize = "5GB",
    dtype: options.Dtype = None,
    verify: Annotated[
        bool | None,
        typer.Option(
            help="Read all files again, compare checksums.", show_default="if several machines have written them"
        ),
    ] = None,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
) -> None:
    """Make a model of what the parts of a merge have left in OUT.

    The options are those of the parts. Where some are missing they are listed; a finished merge is verified.
    """
    with reported(), recording(log_json):
        from pymerge import api

        report = api.finalize(
            config,
            out,
            device=device,
            **options.for_plan(backend, memory, max_shard_size, dtype, device_memory=device_memory),
            verify=verify,
            progress=not quiet,
        )
        print_report(report, quiet=quiet)


def finalized(planned: Plan, out: Path, report: MergeReport, quiet: bool) -> bool:
    """Finalize after a part, if that was the last one; whether the output is whole."""
    from pymerge import api
    from pymerge.output.lock import InUseError

    if report.already_done:
        return True
    if report.missing_files:
        return False
    try:
        done = api.finalize(planned, out, progress=not quiet)
    except InUseError:  # another part is at its end, and makes the model
        return False
    if not quiet:
        print_lines(done.lines())
    return True
