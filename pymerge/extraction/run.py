"""Carries out an extraction: checks, measures tensors on a pool of threads, writes the folder."""

from __future__ import annotations

import json
import math
import platform
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import yaml

from pymerge import env
from pymerge.checkpoint.reader import Reader
from pymerge.common.dtypes import code_of
from pymerge.common.events import event
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.common.units import format_bytes
from pymerge.engine.run import refuse_inputs
from pymerge.errors import OutputError, PlanError
from pymerge.extraction.content import Content, Stored, put_together
from pymerge.extraction.measure import Measured, algorithm, footprint, measure, result_bytes
from pymerge.extraction.names import names_in_memory
from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.report import REPORT_NAME, ExtractReport, TensorReport, read_report, share
from pymerge.extraction.targets import Target, find_targets
from pymerge.extraction.tied import tied_head
from pymerge.ops._op import one_thread
from pymerge.output.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import layout_file
from pymerge.output.manifest import build_manifest, read_manifest
from pymerge.output.verify import verify
from pymerge.planner.plan import Plan


def run(
    plan: Plan,
    options: ExtractOptions,
    out: Path,
    *,
    base: str,
    overwrite: bool = False,
    progress: ProgressSink | None = None,
) -> ExtractReport:
    """Extract the difference of the plan's only expert to its base, which the config of the folder calls `base`.

    Raises:
        PlanError: nothing can be extracted, or a tensor needs more memory than there is; before there is any output.
        OutputError, CheckpointError, NonFiniteError: as their names say.
    """
    started = time.perf_counter()
    progress = progress or NoProgress()
    names = names_in_memory(plan.inputs.donor)
    targets = find_targets(plan, options, names)
    head = tied_head(plan, options)
    _check(targets, plan, options, base)
    refuse_inputs(plan, out)
    plan.check_inputs()
    identity = _identity(plan, options, base)
    manifest = read_manifest(out)
    if manifest is not None and manifest["identity"] == identity and not overwrite:
        return _verified(out, started, progress, plan.warnings)
    late = sum(result_bytes(target, options) for target in targets if options.most is not None)
    with (
        OutputDirectory(
            out, (), identity=identity, late={WEIGHTS_NAME: late}, overwrite=overwrite, keeps_cache=plan.keeps_cache
        ) as output,
        Reader(plan.inputs.stamps) as reader,
    ):
        progress.start(sum(target.bytes_read for target in targets))
        try:
            measured = list(_measured(reader, targets, options, plan, progress))
        finally:
            progress.close()
        content = put_together(measured, plan, options, base, names, head)
        _write(content, output, reader)
        report = _report(measured, content, output, options, plan.warnings, time.perf_counter() - started)
        _publish(content, report, output, plan, options, base)
    event("extracted", report.lines()[0], output=out, rank=report.rank, error=report.error)
    return report


def _check(targets: Sequence[Target], plan: Plan, options: ExtractOptions, base: str) -> None:
    """Raise PlanError where nothing would get factors, or the memory is too small for a tensor."""
    adapted = [target for target in targets if target.place == "factors"]
    if not adapted:
        raise PlanError([f"{base}: no linear weight or convolution is asked for; correct --include and --exclude"])
    largest = max(adapted, key=lambda target: footprint(target, options))
    needed = footprint(largest, options)
    if needed > plan.budget.host:
        raise PlanError(
            [
                f"{largest.base.file}: tensor {largest.name!r} takes {format_bytes(needed)} of memory, and there are "
                f"{format_bytes(plan.budget.host)} ({plan.budget.origin}); raise --memory, or --exclude it"
            ]
        )


def _measured(
    reader: Reader, targets: Sequence[Target], options: ExtractOptions, plan: Plan, progress: ProgressSink
) -> Iterator[Measured]:
    """All targets in their order, as many at a time as there are threads and memory, each on one thread."""
    waiting: deque[tuple[Target, Future[Measured]]] = deque()
    rest, kept = deque(targets), 0
    threads = max(1, plan.target.threads)
    keeps_cache, before = plan.keeps_cache, torch.get_num_threads()

    def work(target: Target) -> Measured:
        with one_thread():
            found = measure(reader, target, options)
        if not keeps_cache:
            reader.release(target.base)
            reader.release(target.expert)
        return found

    with ThreadPoolExecutor(threads, "pymerge-extract", torch.set_num_threads, (1,)) as pool:
        try:
            while rest or waiting:
                used = kept + sum(footprint(target, options) for target, _ in waiting)
                while rest and (
                    not waiting
                    or (len(waiting) < 2 * threads and used + footprint(rest[0], options) <= plan.budget.host)
                ):
                    target = rest.popleft()
                    reader.announce(target.base)
                    reader.announce(target.expert)
                    waiting.append((target, pool.submit(work, target)))
                    used += footprint(target, options)
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
    options: ExtractOptions,
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
            algorithm(each.target, options) if each.target.place == "factors" else "",
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


def _publish(
    content: Content, report: ExtractReport, output: OutputDirectory, plan: Plan, options: ExtractOptions, base: str
) -> None:
    """Put config, report and card beside the factors; the config last, which makes the folder an adapter."""
    card = _card(report, plan, base)
    files = {REPORT_NAME: report.as_json(options.values()), "README.md": card, CONFIG_NAME: content.config}
    manifest = build_manifest(
        (),
        output.checksums,
        files,
        identity=output.identity,
        recipe={"command": "extract", "options": json.dumps(options.values())},
        base_parameters=report.parameters,
        modules=output.beside,
    )
    output.publish(files, manifest, last=CONFIG_NAME)


def _card(report: ExtractReport, plan: Plan, base: str) -> bytes:
    front = {"base_model": base, "library_name": "peft", "tags": ["lora", "pymerge"]}
    expert = plan.config.models[0].model
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# LoRA adapter

Extracted with pymerge {env.version()}: the difference of `{expert}` to `{base}`, rank {report.rank}. The factors lose
{100 * report.error:.3g} % of the norm of what they adapt; {100 * report.error_of_all:.3g} % of the whole difference is
lost (`{REPORT_NAME}` has each tensor).
""".encode("utf-8", "backslashreplace")


def _identity(plan: Plan, options: ExtractOptions, base: str) -> dict[str, str]:
    """All that decides the bytes of the output."""
    parts = plan.identity(f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}")
    parts |= {f"extract {name}": json.dumps(value) for name, value in options.values().items()}
    parts |= {f"{name} version": env.package_versions()[name] for name in ("torch", "transformers")}
    return parts | {"command": "extract", "extract base": base}


def _verified(out: Path, started: float, progress: ProgressSink, warnings: tuple[str, ...]) -> ExtractReport:
    """The report of an output that was there already, after reading it again."""
    found = verify(out, progress=progress)
    if found.problems:
        raise OutputError(
            f"{out} holds this extraction, but damaged: " + "; ".join(found.problems) + "; give --overwrite to redo it"
        )
    return read_report(out, time.perf_counter() - started, warnings)
