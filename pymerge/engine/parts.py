"""Parts of a merge, each by a process of its own, and what makes an output of them."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

from pymerge.common.events import event
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.common.units import count_of
from pymerge.engine.memory import peak_resident_bytes
from pymerge.engine.publishing import publish, verified
from pymerge.engine.report import MergeReport
from pymerge.engine.run import begin, merge_files, whole_directory
from pymerge.errors import ArgumentError, OutputError
from pymerge.output.directory import OutputDirectory
from pymerge.output.manifest import read_manifest
from pymerge.output.part import PartDirectory
from pymerge.planner.parts import Part, assign
from pymerge.planner.plan import Plan


def run_part(
    plan: Plan, out: Path, part: Part, *, progress: ProgressSink | None = None, profile: Path | None = None
) -> MergeReport:
    """Merge the files of one part of a plan into the work folder of `out`, beside other processes that do so.

    `finalize` makes an output of them. Of an output that is published already, nothing is done.

    Raises:
        OutputError: `out` holds something else, or a run that has it alone; and what `pymerge.engine.run.run` raises.
    """
    started = time.perf_counter()
    number, count = part
    identity = begin(plan, out)
    done = replace(nothing_done(plan, out, started), part=part, already_done=True)
    if _is_published(out, identity):
        report = done
    else:
        files = assign(plan, count)[number - 1]
        try:
            report = replace(merge_part(plan, out, files, identity, progress, profile, parts=count), part=part)
        except OutputError:
            if not _is_published(out, identity):
                raise
            report = done  # by another part, between the look above and the lock
        if _is_published(out, identity):  # meanwhile, by another part
            report = replace(report, missing_files=0, already_done=True)
    event("finished", report.lines()[0], **asdict(report))
    return report


def merge_part(
    plan: Plan,
    out: Path,
    files: Collection[str],
    identity: dict[str, str],
    progress: ProgressSink | None = None,
    profile: Path | None = None,
    *,
    parts: int = 0,
) -> MergeReport:
    """Merge these files of a plan, as one of several processes; `parts` says how many there are, if that is known."""
    started = time.perf_counter()
    if plan.extras.layouts or plan.extras.late:
        raise ArgumentError("parts are of models alone, without files beside them; merge it by one process")
    layouts = [layout for layout in plan.files if layout.file in files]
    with PartDirectory(
        out,
        plan.layouts,
        files,
        identity=identity,
        beside=plan.modules,
        parts=parts,
        keeps_cache=plan.keeps_cache,
    ) as output:
        done = merge_files(plan, output, output.path, output.finished, progress or NoProgress(), profile, files)
    # Not before the lock is given back: of several that end together, the last to ask finds all files, and can publish.
    missing = len(output.missing)
    report = done.report(plan, out, layouts, time.perf_counter() - started)
    return replace(report, files=len(layouts), missing_files=missing)


def finalize(plan: Plan, out: Path, *, verify: bool | None = None, progress: ProgressSink | None = None) -> MergeReport:
    """Publish what the parts of a plan have made, as one merge would have written it; verify what is published already.

    Args:
        plan: that of all parts.
        out: their directory.
        verify: read all files again and compare their checksums; default: where several machines have written them.
        progress: told about the bytes of an output that is verified.

    Raises:
        OutputError: files are missing or no longer as written, which names the parts to run (again); or `out` holds
            parts of another merge, or none, or one that is being written.
        CheckpointError: an input has changed, among others.
    """
    started = time.perf_counter()
    identity = begin(plan, out)
    if _is_published(out, identity):
        return verified(plan, out, started, progress or NoProgress())
    output = whole_directory(plan, out, identity).adopt(verify=verify)
    with output:
        conclude(plan, output)
    report = replace(nothing_done(plan, out, started), files=len(plan.files))
    event("finished", report.lines()[0], **asdict(report))
    return report


def _is_published(out: Path, identity: dict[str, str]) -> bool:
    """Whether `out` holds this very merge, whole."""
    manifest = read_manifest(out)
    return manifest is not None and manifest["identity"] == identity


def conclude(plan: Plan, output: OutputDirectory) -> None:
    """Publish a directory that parts have written. Raises OutputError, with what to do, where files are missing."""
    if output.missing:
        raise OutputError(_too_early(plan, output))
    publish(plan, output)


def _too_early(plan: Plan, output: OutputDirectory) -> str:
    missing, count = output.missing, output.parts
    text = f"{output.path}: missing {len(missing)} of {count_of(len(plan.files), 'file')}, {missing[0]} among them"
    if not count:
        return f"{text}; run pymerge merge CONFIG OUT, which makes them and ends the merge"
    parts = [number for number, files in enumerate(assign(plan, count), 1) if not set(files).isdisjoint(missing)]
    names = ", ".join(f"{number}/{count}" for number in parts)
    what = f"part {names}" if len(parts) == 1 else f"parts {names}"
    return f"{text}; run {what} (again), then finalize: pymerge merge CONFIG OUT --part {parts[0]}/{count}"


def nothing_done(plan: Plan, out: Path, started: float) -> MergeReport:
    """The report of a run that has merged nothing."""
    return MergeReport(
        output=out,
        tensors=plan.tensors,
        parameters=plan.parameters,
        bytes_read=0,
        bytes_written=0,
        seconds=time.perf_counter() - started,
        reading=0.0,
        computing=0.0,
        writing=0.0,
        budget=plan.budget.tensors,
        peak_memory=peak_resident_bytes(),
        peak_device_memory=0,
        warnings=plan.warnings,
    )
