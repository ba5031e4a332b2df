"""Carries out what makes an adapter: works out its factors, and writes the folder."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from pymerge.checkpoint.checkpoint import TensorEntry
from pymerge.checkpoint.reader import Reader
from pymerge.common.events import event
from pymerge.common.progress import ProgressSink
from pymerge.engine.run import refuse_inputs
from pymerge.errors import NonFiniteError, OutputError, PlanError
from pymerge.extraction.content import Content, put_together
from pymerge.extraction.measure import Measured
from pymerge.extraction.report import REPORT_NAME, ExtractReport, TensorReport, read_report, share
from pymerge.extraction.stages import work_out
from pymerge.extraction.work import Work
from pymerge.output.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import layout_file
from pymerge.output.manifest import build_manifest, read_manifest
from pymerge.output.verify import verify


def carry_out(work: Work, out: Path, progress: ProgressSink, *, overwrite: bool) -> ExtractReport:
    """Make the adapter in the folder `out`. One that is there already, of the very same work, is verified; one that was
    interrupted goes on behind the last part that was kept.

    Raises:
        PlanError: a tensor needs more memory than there is, or nothing gets factors; before there is any output.
        OutputError, CheckpointError, NonFiniteError: as their names say.
    """
    started = time.perf_counter()
    plan = work.plan
    work.check_memory()
    refuse_inputs(plan, out)
    plan.check_inputs()
    identity = work.identity()
    manifest = read_manifest(out)
    if manifest is not None and manifest["identity"] == identity and not overwrite:
        return _verified(out, started, progress, work.warnings)
    with OutputDirectory(
        out,
        (),
        identity=identity,
        late={WEIGHTS_NAME: work.result_bytes},
        interim=work.interim,
        overwrite=overwrite,
        keeps_cache=plan.keeps_cache,
    ) as output:
        resumed = len(output.finished)
        if resumed:
            text = f"kept {resumed} finished parts of an interrupted run"
            event("resumed", text, parts=sorted(output.finished))
        found = work_out(work, output, progress)
        experts = {**work.experts, **found.experts}
        try:
            measured = [*found.measured, *(Measured[TensorEntry](target, 0.0, 0.0) for target in work.zeros)]
            content = put_together(measured, plan, work.options, work.base, work.names, work.head, experts)
            with Reader(found.stamps) as reader:
                _write(content, output, reader)
        except (PlanError, NonFiniteError):  # the same command would end the same
            output.abandon(keep=False)
            raise
        report = _report(found.measured, content, output, work.warnings, resumed, time.perf_counter() - started)
        files = {REPORT_NAME: report.as_json(work.options.values()), "README.md": work.card(report), **work.files}
        files[CONFIG_NAME] = content.config  # last: it makes the folder an adapter
        manifest = build_manifest(
            (),
            output.checksums,
            files,
            identity=output.identity,
            recipe=work.recipe,
            base_parameters=report.parameters,
            modules=output.beside,
        )
        output.publish(files, manifest, last=CONFIG_NAME)
    event("adapter", report.lines()[0], output=out, rank=report.rank, error=report.error)
    return report


def _write(content: Content, output: OutputDirectory, reader: Reader) -> None:
    if WEIGHTS_NAME in output.finished:  # an earlier run was stopped while it published: these very bytes are there
        return
    described = [(name, each.code, each.shape) for name, each in content.tensors.items()]
    output.settle(layout_file(WEIGHTS_NAME, described))
    for name, each in content.tensors.items():
        for piece in each.pieces(reader):
            output.write(name, piece)


def _report(
    measured: Sequence[Measured[TensorEntry]],
    content: Content,
    output: OutputDirectory,
    warnings: tuple[str, ...],
    resumed: int,
    seconds: float,
) -> ExtractReport:
    tensors = tuple(
        TensorReport(
            each.target.name,
            each.target.place,
            each.target.base.shape,
            math.sqrt(each.total),
            share(each.lost, each.total),
            each.rank,
            each.algorithm,
            each.target.reason,
        )
        for each in measured
        if each.total > 0
    )
    adapted = [each for each in measured if each.target.place == "factors"]
    return ExtractReport(
        output.path,
        tensors,
        content.rank,
        parameters=sum(math.prod(each.shape) for each in content.tensors.values()),
        bytes_written=sum(layout.nbytes for layout in output.beside),
        error=share(math.fsum(each.lost for each in adapted), math.fsum(each.total for each in adapted)),
        error_of_all=share(math.fsum(each.lost for each in measured), math.fsum(each.total for each in measured)),
        note=content.note,
        seconds=seconds,
        warnings=warnings,
        resumed_parts=resumed,
    )


def _verified(out: Path, started: float, progress: ProgressSink, warnings: tuple[str, ...]) -> ExtractReport:
    """The report of an output that was there already, after reading it again."""
    found = verify(out, progress=progress)
    if found.problems:
        raise OutputError(
            f"{out} holds this adapter, but damaged: " + "; ".join(found.problems) + "; give --overwrite to redo it"
        )
    return read_report(out, time.perf_counter() - started, warnings)
