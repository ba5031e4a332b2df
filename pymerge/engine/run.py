"""Carries out a plan: opens inputs and output, runs the executor, publishes, reports."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING

from pymerge.backends import measured, native
from pymerge.backends.runner import Runner, check_backend
from pymerge.checkpoint.reader import Reader
from pymerge.common.blas import blas_name
from pymerge.common.devices import Device, resolve_device
from pymerge.common.events import event, logger
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.engine.executor import Executor
from pymerge.engine.measuring import measured as informed
from pymerge.engine.measuring import measuring
from pymerge.engine.memory import peak_resident_bytes
from pymerge.engine.publishing import publish, verified
from pymerge.engine.report import MergeReport
from pymerge.engine.trace import Tracer
from pymerge.engine.worker import Context, Sink
from pymerge.errors import OutputError, PlanError
from pymerge.methods import METHODS
from pymerge.output.directory import OutputDirectory
from pymerge.output.layout import ShardLayout
from pymerge.output.manifest import read_manifest
from pymerge.planner.data import gram_bytes
from pymerge.planner.jobs import batches
from pymerge.planner.plan import Plan
from pymerge.planner.workers import Target

if TYPE_CHECKING:
    import torch


def resolve_target(device: str | torch.device, backend: str, methods: Collection[str] = ()) -> Target:
    """The target of a plan on a device and backend; BackendError if one of them cannot be used here.

    Where the device is "auto" it is CUDA, if there is one and one of the `methods` gains by it: those that solve linear
    weights, and others that were measured. Element by element a merge takes as long as its files need to the device.
    """
    resolved = resolve_device(device)
    if str(device) == "auto" and resolved.type == "cuda" and methods and not any(map(_gains, methods)):
        reason = "the C++ ops take these as fast as files are read; nobody has measured this GPU to be faster"
        event("device_chosen", f"cpu ({reason}; --device cuda takes it)", device="cpu", reason=reason)
        resolved = Device("cpu")
    check_backend(backend, resolved)
    return Target(resolved, backend, native.missing() is None)


def _gains(method: str) -> bool:
    """Whether merges by a method gain by the GPU; of an unknown method, which is refused elsewhere, too."""
    import torch

    from pymerge.methods.solver import SolverMethod

    if method not in METHODS or isinstance(METHODS[method], SolverMethod):
        return True
    return measured.gains(torch.cuda.get_device_name(), method)


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
    collected: Callable[[Plan, OutputDirectory], Plan] | None = None,
) -> MergeReport:
    """Carry out a plan.

    Args:
        plan: from `build_plan`; its extras are made after the model.
        out: output directory; new, empty, or holding this very merge (unfinished: it goes on; finished: it is
            verified).
        overwrite: replace another merge that is there.
        progress: told about bytes and tensors; default: nobody.
        profile: file for a trace of all reads, computations and writes (see pymerge.engine.trace).
        collected: of a method that needs data: runs models over it, keeps what is found in interim files of the output,
            and gives the plan that knows it.

    Raises:
        OutputError, CheckpointError, BackendError: as their names say.
        NonFiniteError: an input holds NaN or infinity (and the config does not allow it), or a result overflows.
        OutOfMemoryError: the machine has less memory than the plan was told.
    """
    started = time.perf_counter()
    progress = progress or NoProgress()
    identity = begin(plan, out, by_data=collected is not None)
    manifest = read_manifest(out)
    if manifest is not None and manifest["identity"] == identity and not overwrite:
        return verified(plan, out, started, progress)
    with whole_directory(plan, out, identity, overwrite=overwrite) as output:
        known = plan if collected is None or not output.missing else collected(plan, output)
        done = merge_files(known, output, output.path, output.finished, progress, profile)
        publish(plan, output)
    report = done.report(plan, output.path, [*plan.layouts, *output.beside], time.perf_counter() - started)
    event("finished", report.lines()[0], **asdict(report))
    return report


def begin(plan: Plan, out: Path, *, by_data: bool = False) -> dict[str, str]:
    """Log a plan and refuse it where it cannot be carried out; returns the merge's identity on this processor."""
    check(plan, out, by_data=by_data)
    return plan.identity(processor(plan))


def check(plan: Plan, out: Path, *, by_data: bool = False) -> None:
    """Log a plan, and refuse it where it cannot be carried out; `by_data` says that models are run over data."""
    if plan.method.needs_data and not by_data:
        raise PlanError(
            [f"{plan.method.name} merges block after block, by what those before have become; merge it by one process"]
        )
    refuse_adapter(plan)
    _log_plan(plan)
    refuse_inputs(plan, out)
    plan.check_inputs()


def whole_directory(plan: Plan, out: Path, identity: dict[str, str], *, overwrite: bool = False) -> OutputDirectory:
    """The output directory of a plan, for who holds it alone."""
    return OutputDirectory(
        out,
        plan.layouts,
        identity=identity,
        beside=(*plan.modules, *plan.extras.layouts),
        late=plan.extras.late,
        interim=gram_bytes(plan.steps) if plan.method.needs_data else None,
        copied=sum((plan.inputs.donor.path / file).stat().st_size for file in plan.inputs.donor.beside.copied),
        overwrite=overwrite,
        keeps_cache=plan.keeps_cache,
    )


@dataclass(frozen=True)
class Done:
    """Files that have been merged: what was read, and with what; `kept` are those that were there already."""

    kept: frozenset[str]
    bytes_read: int
    executor: Executor
    tracer: Tracer

    def report(self, plan: Plan, out: Path, layouts: Sequence[ShardLayout], seconds: float) -> MergeReport:
        """The report on these files, as many as were to be merged."""
        written = [layout for layout in layouts if layout.file not in self.kept]
        files = {layout.file for layout in layouts}
        return MergeReport(
            output=out,
            tensors=sum(len(layout.tensors) for layout in plan.files if layout.file in files),
            parameters=sum(math.prod(step.shape) for step in plan.steps if step.file in files),
            bytes_read=self.bytes_read,
            bytes_written=sum(tensor.nbytes for layout in written for tensor in layout.tensors),
            seconds=seconds,
            reading=self.executor.times.reading,
            computing=self.executor.times.computing,
            writing=self.executor.times.writing,
            overlap=self.tracer.overlap,
            slowest=self.tracer.slowest(),
            budget=plan.budget.tensors,
            peak_memory=peak_resident_bytes(),
            peak_device_memory=_peak_device_memory(plan.target.device),
            backends=self.executor.backends,
            warnings=plan.warnings,
            resumed_shards=len(self.kept & files),
        )


def merge_files(
    plan: Plan,
    output: Sink,
    folder: Path,
    finished: frozenset[str],
    progress: ProgressSink,
    profile: Path | None = None,
    files: Collection[str] | None = None,
) -> Done:
    """Merge the files of a plan, all or only these `files`, but for those that are `finished`.

    Args:
        output: of the output directory `folder`, which this process holds.
    """
    device, extras = plan.target.device, plan.extras
    _peak_device_memory(device, reset=True)
    if plan.budget.device_limit is not None:
        limit_device(device, plan.budget.device_limit)
    if finished:
        text = f"kept {len(finished)} finished shards of an interrupted run"
        event("resumed", text, shards=sorted(finished))
    others = set() if files is None else {layout.file for layout in plan.files} - set(files)
    with Tracer(profile, nvtx=device.type == "cuda") as tracer, Reader(plan.inputs.stamps) as reader:
        merging, beside = (
            batches(steps, plan.budget, finished | others, plan.target.threads) for steps in (plan.steps, extras.steps)
        )
        before = batches(measuring(plan.steps), plan.budget, threads=plan.target.threads) if merging else []
        jobs = [job for batch in (*before, *merging, *beside) for job in batch.jobs]
        read = sum(job.step.bytes_of(job.piece) for job in jobs if job.reads)
        progress.start(read + sum(job.step.bytes_made(job.piece) for job in jobs if job.merges))
        runner = Runner(plan.target.backend, device)
        context = Context(runner, reader, tracer, progress, plan.config.allow_nonfinite, plan.keeps_cache)
        executor = Executor(context, output, plan.target.threads)
        try:
            if merging:
                known = informed(plan.steps, plan.budget, context, plan.target.threads, folder)
                if known is not plan.steps:
                    merging = batches(known, plan.budget, finished | others, plan.target.threads)
            executor.run(merging, plan.budget.tensors)
            executor.run(beside, plan.budget.host)
        finally:
            progress.close()
    return Done(finished, read, executor, tracer)


def _peak_device_memory(device: Device, *, reset: bool = False) -> int:
    """Bytes allocated on a CUDA device at most, since the last `reset`; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    import torch

    if reset:
        torch.cuda.reset_peak_memory_stats(str(device))
    return torch.cuda.max_memory_allocated(str(device))


def limit_device(device: Device, limit: int) -> None:
    """Have PyTorch take at most so many bytes of a CUDA device beside those that it holds already; it fails before it
    takes more. Code and libraries on the device, some hundred MB, are not counted."""
    import torch

    total = torch.cuda.get_device_properties(str(device)).total_memory
    held = torch.cuda.memory_reserved(str(device))
    torch.cuda.set_per_process_memory_fraction(min(1.0, (held + limit) / total), str(device))


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
    for file in plan.inputs.grams:
        if out.resolve() in file.resolve().parents:
            raise OutputError(f"{out} holds the input {file}; give another directory")
