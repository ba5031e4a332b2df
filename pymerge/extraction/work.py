"""Carries out what makes an adapter: measures targets on a pool of threads, and writes the folder."""

from __future__ import annotations

import json
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from pymerge import env
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import code_of
from pymerge.common.events import event
from pymerge.common.progress import ProgressSink
from pymerge.common.units import format_bytes
from pymerge.engine.run import refuse_inputs
from pymerge.errors import OutputError, PlanError
from pymerge.extraction.content import Content, Stored, put_together
from pymerge.extraction.measure import Measured, result_bytes
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.report import REPORT_NAME, ExtractReport, TensorReport, read_report, share
from pymerge.extraction.targets import Target
from pymerge.extraction.tied import TiedHead
from pymerge.ops._op import one_thread
from pymerge.output.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import layout_file
from pymerge.output.manifest import build_manifest, read_manifest
from pymerge.output.verify import verify
from pymerge.planner.plan import Plan


@dataclass(frozen=True)
class Work:
    """All that decides an adapter: what is done to which tensors of a plan, and how the folder speaks of it.

    `base` is the base as adapter_config.json names it, `names` are those of its tensors in memory. `card` gives the
    front matter's base and the text of README.md, `files` come beside it, `recipe` is the manifest's.
    """

    plan: Plan
    options: ExtractOptions
    base: str
    targets: Sequence[Target]
    names: Mapping[str, str]
    head: TiedHead | None
    measure: Callable[[Reader, Target], Measured]
    footprint: Callable[[Target], int]
    card: Callable[[ExtractReport], bytes]
    files: Mapping[str, bytes]
    recipe: Mapping[str, str]
    reads_all: bool = True  # of both tensors of a target
    also: Callable[[Reader], list[Measured]] | None = None  # what is measured otherwise, when all targets are

    def identity(self) -> dict[str, str]:
        """All that decides the bytes of the output."""
        parts = self.plan.identity(f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}")
        parts |= {f"adapter {name}": json.dumps(value) for name, value in self.options.values().items()}
        parts |= {f"{name} version": env.package_versions()[name] for name in ("torch", "transformers")}
        return parts | {f"recipe {key}": text for key, text in self.recipe.items()} | {"adapter base": self.base}


def carry_out(work: Work, out: Path, progress: ProgressSink, *, overwrite: bool) -> ExtractReport:
    """Make the adapter in the folder `out`; one that is there already, of the very same work, is verified.

    Raises:
        PlanError: a tensor needs more memory than there is, or nothing gets factors; before there is any output.
        OutputError, CheckpointError, NonFiniteError: as their names say.
    """
    started = time.perf_counter()
    plan = work.plan
    _check_memory(work)
    refuse_inputs(plan, out)
    plan.check_inputs()
    identity = work.identity()
    manifest = read_manifest(out)
    if manifest is not None and manifest["identity"] == identity and not overwrite:
        return _verified(out, started, progress, plan.warnings)
    late = sum(result_bytes(target, work.options) for target in work.targets if work.options.most is not None)
    with (
        OutputDirectory(
            out, (), identity=identity, late={WEIGHTS_NAME: late}, overwrite=overwrite, keeps_cache=plan.keeps_cache
        ) as output,
        Reader(plan.inputs.stamps) as reader,
    ):
        progress.start(sum(target.bytes_read for target in work.targets))
        try:
            measured = list(_measured(reader, work, progress))
            measured += work.also(reader) if work.also else []
        finally:
            progress.close()
        content = put_together(measured, plan, work.options, work.base, work.names, work.head)
        _write(content, output, reader)
        report = _report(measured, content, output, plan.warnings, time.perf_counter() - started)
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


def _check_memory(work: Work) -> None:
    """Raise PlanError where the memory is too small for a tensor."""
    largest = max(work.targets, key=work.footprint, default=None)
    if largest is None:
        return
    needed, budget = work.footprint(largest), work.plan.budget
    if needed > budget.host:
        raise PlanError(
            [
                f"{largest.base.file}: tensor {largest.name!r} takes {format_bytes(needed)} of memory, and there are "
                f"{format_bytes(budget.host)} ({budget.origin}); raise --memory, or leave it out"
            ]
        )


def _measured(reader: Reader, work: Work, progress: ProgressSink) -> Iterator[Measured]:
    """All targets in their order, as many at a time as there are threads and memory, each on one thread."""
    waiting: deque[tuple[Target, Future[Measured]]] = deque()
    rest, kept, plan = deque(work.targets), 0, work.plan
    threads = max(1, plan.target.threads)
    keeps_cache, before = plan.keeps_cache, torch.get_num_threads()

    def one(target: Target) -> Measured:
        with one_thread():
            found = work.measure(reader, target)
        if work.reads_all and not keeps_cache:
            reader.release(target.base)
            reader.release(target.expert)
        return found

    with ThreadPoolExecutor(threads, "pymerge-extract", torch.set_num_threads, (1,)) as pool:
        try:
            while rest or waiting:
                used = kept + sum(work.footprint(target) for target, _ in waiting)
                while rest and (
                    not waiting or (len(waiting) < 2 * threads and used + work.footprint(rest[0]) <= plan.budget.host)
                ):
                    target = rest.popleft()
                    if work.reads_all:
                        reader.announce(target.base)
                        reader.announce(target.expert)
                    waiting.append((target, pool.submit(one, target)))
                    used += work.footprint(target)
                target, future = waiting.popleft()
                progress.tensor(target.name)
                found = future.result()
                progress.advance(target.bytes_read)
                kept += sum(left.nbytes + right.nbytes for left, right in found.pairs)
                yield found
        finally:
            for _, future in waiting:
                future.cancel()
    torch.set_num_threads(before)  # what later threads start with


def _write(content: Content, output: OutputDirectory, reader: Reader) -> None:
    if WEIGHTS_NAME in output.finished:  # an earlier run was stopped while it published: these very bytes are there
        return
    described = [
        (name, each.code if isinstance(each, Stored) else code_of(each.dtype), tuple(each.shape))
        for name, each in content.tensors.items()
    ]
    layout = layout_file(WEIGHTS_NAME, described)
    output.settle(layout)
    for name, each in content.tensors.items():
        for piece in each.pieces(reader) if isinstance(each, Stored) else (each,):
            output.write(name, piece)


def _report(
    measured: Sequence[Measured],
    content: Content,
    output: OutputDirectory,
    warnings: tuple[str, ...],
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
    )


def _verified(out: Path, started: float, progress: ProgressSink, warnings: tuple[str, ...]) -> ExtractReport:
    """The report of an output that was there already, after reading it again."""
    found = verify(out, progress=progress)
    if found.problems:
        raise OutputError(
            f"{out} holds this extraction, but damaged: " + "; ".join(found.problems) + "; give --overwrite to redo it"
        )
    return read_report(out, time.perf_counter() - started, warnings)
