"""Carries out a plan: opens inputs and output, runs the executor, publishes, reports."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.backends import native
from pymerge.backends.runner import Runner, check_backend
from pymerge.checkpoint.reader import Reader
from pymerge.common.blas import blas_name
from pymerge.common.devices import Device, resolve_device
from pymerge.common.events import event, logger
from pymerge.common.names import printable
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.engine.executor import Executor
from pymerge.engine.memory import peak_resident_bytes
from pymerge.engine.model_card import RECIPE_NAME, model_card
from pymerge.engine.report import MergeReport
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Context
from pymerge.errors import OutputError, PlanError
from pymerge.output.directory import OutputDirectory
from pymerge.output.manifest import build_manifest, read_manifest
from pymerge.planner.jobs import batches
from pymerge.planner.plan import Plan
from pymerge.planner.workers import Target

if TYPE_CHECKING:
    import torch


def resolve_target(device: str | torch.device, backend: str) -> Target:
    """The target of a plan on a device and backend; BackendError if one of them cannot be used here."""
    resolved = resolve_device(device)
    check_backend(backend, resolved)
    return Target(resolved, backend, native.missing() is None)


def processor(plan: Plan) -> str:
    """Name of the processor, as far as the bytes of the output may depend on it.

    That is the name of the GPU, or the instructions that PyTorch and numpy use on this CPU. Native code on arrays gives
    the same bytes with all instructions of an architecture.
    """
    device = plan.target.device
    numpys = f" {blas_name()}".rstrip() if plan.needs_blas else ""
    if not plan.needs_torch:
        return platform.machine() + numpys
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(str(device)) + numpys
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{numpys}"


def run(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    progress: ProgressSink | None = None,
    profile: Path | None = None,
) -> MergeReport:
    """Carry out a plan.

    Args:
        plan: from `build_plan`; its extras are made after the model.
        out: output directory; new, empty, or holding this very merge (unfinished: it goes on; finished: it is
            verified).
        overwrite: replace another merge that is there.
        progress: told about bytes and tensors; default: nobody.
        profile: file for a trace of all reads, computations and writes (see pymerge.engine.trace).

    Raises:
        OutputError, CheckpointError, BackendError: as their names say.
        NonFiniteError: an input holds NaN or infinity (and the config does not allow it), or a result overflows.
        OutOfMemoryError: the machine has less memory than the plan was told.
    """
    refuse_adapter(plan)
    started = time.perf_counter()
    progress = progress or NoProgress()
    device, extras = plan.target.device, plan.extras
    runner = Runner(plan.target.backend, device)
    _log_plan(plan)
    refuse_inputs(plan, out)
    plan.check_inputs()
    identity = plan.identity(processor(plan))
    manifest = read_manifest(out)
    if manifest is not None and manifest["identity"] == identity and not overwrite:
        return _verified(plan, out, started, progress)
    _peak_device_memory(device, reset=True)
    with (
        Tracer(profile, nvtx=device.type == "cuda") as tracer,
        OutputDirectory(
            out,
            plan.layouts,
            identity=identity,
            beside=(*plan.modules, *extras.layouts),
            late=extras.late,
            copied=sum((plan.inputs.donor.path / file).stat().st_size for file in plan.inputs.donor.beside.copied),
            overwrite=overwrite,
            keeps_cache=plan.keeps_cache,
        ) as output,
        Reader(plan.inputs.stamps) as reader,
    ):
        kept = output.finished
        if kept:
            event("resumed", f"kept {len(kept)} finished shards of an interrupted run", shards=sorted(kept))
        merging, beside = (batches(steps, plan.budget, kept) for steps in (plan.steps, extras.steps))
        jobs = [job for batch in (*merging, *beside) for job in batch.jobs]
        read = sum(job.step.bytes_of(job.piece) for job in jobs if job.reads)
        progress.start(read + sum(job.step.bytes_made(job.piece) for job in jobs if job.merges))
        context = Context(runner, reader, tracer, progress, plan.config.allow_nonfinite, plan.keeps_cache)
        executor = Executor(context, output, plan.target.threads)
        try:
            executor.run(merging, plan.budget.tensors)
            executor.run(beside, plan.budget.host)
        finally:
            progress.close()
        _publish(plan, output)
    return _report(plan, output, kept, read, executor, tracer, time.perf_counter() - started)


def _report(
    plan: Plan,
    output: OutputDirectory,
    kept: frozenset[str],
    read: int,
    executor: Executor,
    tracer: Tracer,
    seconds: float,
) -> MergeReport:
    """The report of a run that read so many bytes, and wrote all files but those that were `kept`."""
    written = [layout for layout in (*plan.layouts, *output.beside) if layout.file not in kept]
    report = MergeReport(
        output=output.path,
        tensors=plan.tensors,
        parameters=plan.parameters,
        bytes_read=read,
        bytes_written=sum(tensor.nbytes for layout in written for tensor in layout.tensors),
        seconds=seconds,
        reading=executor.times.reading,
        computing=executor.times.computing,
        writing=executor.times.writing,
        overlap=tracer.overlap,
        slowest=tracer.slowest(),
        budget=plan.budget.tensors,
        peak_memory=peak_resident_bytes(),
        peak_device_memory=_peak_device_memory(plan.target.device),
        backends=executor.backends,
        warnings=plan.warnings,
        resumed_shards=len(kept),
    )
    event("finished", report.lines()[0], **asdict(report))
    return report


def _peak_device_memory(device: Device, *, reset: bool = False) -> int:
    """Bytes allocated on a CUDA device at most, since the last `reset`; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    import torch

    if reset:
        torch.cuda.reset_peak_memory_stats(str(device))
    return torch.cuda.max_memory_allocated(str(device))


def _log_plan(plan: Plan) -> None:
    text = f"{plan.method.name}: {len(plan.steps)} tensors, {plan.bytes_read} bytes to read"
    if by_factors := sum(step.route == "core" for step in plan.steps):
        text += f", {by_factors} solved by the factors of adapters"
    if logger.isEnabledFor(INFO):  # the summary takes as long as planning
        event("plan", text, **plan.summary(), backend=plan.target.backend, device=str(plan.target.device))
    for warning in plan.warnings:
        event("warning", warning, level=WARNING)


def refuse_adapter(plan: Plan) -> None:
    """Raise PlanError where the config asks for an adapter, or says what only an adapter has."""
    config = plan.config
    if config.output == "adapter":
        raise PlanError([f"{config.place('output')}: an adapter is made by pymerge merge, or merge_adapters"])
    for key in ("rank", "full_tensors"):
        if getattr(config, key) is not None:
            raise PlanError([f"{config.place(key)}: {key} is of an adapter; add output: adapter, or delete it"])


def refuse_inputs(plan: Plan, out: Path) -> None:
    """An output that is an input would, with overwrite, be removed before it is read."""
    for checkpoint in plan.inputs.all:
        folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        parents = {parent for file in checkpoint.files for parent in file.resolve().parents}
        if out.resolve() in {folder.resolve(), *parents}:
            raise OutputError(f"{out} holds the input {checkpoint.path}; give another directory")


def _publish(plan: Plan, output: OutputDirectory) -> None:
    """Put everything beside the weights in place, and make the output visible."""
    donor = plan.inputs.donor
    files: dict[str, bytes | Path] = {path.as_posix(): donor.path / path for path in donor.other_files}
    files = {name: source for name, source in files.items() if name not in plan.tokens.dropped} | dict(
        plan.tokens.files
    )
    if "config.json" in files:  # of a folder whose transformer, with its config.json, is in a folder of its own
        files["config.json"] = (donor.path / "config.json").read_bytes()
    if plan.config_json is not None:
        files[Path(donor.folder, "config.json").as_posix()] = plan.config_json
    files["README.md"] = model_card(plan)
    files = {name: source for name, source in files.items() if name not in plan.given}
    files |= {name: data for name, data in plan.given.items() if data is not None}
    files[RECIPE_NAME] = plan.config.source_text.encode()
    layouts = output.beside[len(plan.modules) :]
    beside = plan.extras.files(layouts)
    manifest = build_manifest(
        plan.layouts,
        output.checksums,
        files | beside,
        identity=output.identity,
        recipe={
            "config": RECIPE_NAME,
            "directory": printable(plan.config.directory or Path.cwd()),
            "dtype": plan.dtype,
            "backend": plan.target.backend,
            "device": str(plan.target.device),
        },
        base_parameters=plan.base_parameters,
        modules=plan.modules,
        beside=layouts,
        changeable=plan.extras.changeable,
        infinite={step.name: step.infinite for step in plan.steps if step.infinite},
    )
    output.publish(files | beside, manifest, last=next(reversed(beside), None))


def _verified(plan: Plan, out: Path, started: float, progress: ProgressSink) -> MergeReport:
    """The report of an output that was there already, after reading it again."""
    from pymerge.output.verify import verify

    found = verify(out, progress=progress, allow_nonfinite=plan.config.allow_nonfinite)
    if found.problems:
        raise OutputError(
            f"{out} holds this merge, but damaged: " + "; ".join(found.problems) + "; give --overwrite to redo it"
        )
    report = MergeReport(
        output=out,
        tensors=found.tensors,
        parameters=found.parameters,
        bytes_read=found.nbytes,
        bytes_written=0,
        seconds=(seconds := time.perf_counter() - started),
        reading=seconds,
        computing=0.0,
        writing=0.0,
        budget=plan.budget.tensors,
        peak_memory=peak_resident_bytes(),
        peak_device_memory=0,
        warnings=plan.warnings,
        already_done=True,
    )
    event("already_done", report.lines()[0], **asdict(report))
    return report
