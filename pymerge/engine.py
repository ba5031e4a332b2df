"""Follows a plan: reads ahead, computes, writes behind. The only owner of threads and devices."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from logging import DEBUG, WARNING
from pathlib import Path

import torch
from torch import Tensor

from pymerge import pieces
from pymerge.backends import Dispatcher
from pymerge.checkpoint import (
    TORCH_DTYPES,
    OutputDirectory,
    Reader,
    TensorEntry,
    build_manifest,
    printable,
    read_manifest,
    verify,
)
from pymerge.errors import ArgumentError, BackendError, NonFiniteError, OutputError
from pymerge.finite import check_finite, is_finite
from pymerge.logs import event
from pymerge.pieces import Piece
from pymerge.planner import READ_AHEAD, WRITE_BEHIND, Plan, Step
from pymerge.progress import NoProgress, ProgressSink
from pymerge.report import RECIPE_NAME, MergeReport, model_card

_READ_THREADS = 4


@dataclass
class _Clock:
    """Seconds that the computing thread spent on each part of the work."""

    reading: float = 0.0
    computing: float = 0.0
    writing: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started


class _Heap:
    """Gives freed memory back to the system.

    Left alone, glibc keeps freed blocks of up to 32 MiB for later use. Tensors are freed on other threads than those
    that allocate, in other sizes than the next ones, and the process would grow from layer to layer. So large blocks
    are mapped one by one, and what has gathered from smaller ones is returned now and then. Other C libraries don't
    hold on, and have neither function.
    """

    _STEP = 32 * 2**20
    _MMAP_THRESHOLD = -3, 8 * 2**20  # M_MMAP_THRESHOLD and its value in bytes

    def __init__(self) -> None:
        self._kept = 0
        library = ctypes.CDLL(None)
        self._trim = getattr(library, "malloc_trim", None)
        if hasattr(library, "mallopt"):
            library.mallopt(*self._MMAP_THRESHOLD)

    def freed(self, count: int) -> None:
        """`count` bytes have been freed since the last call."""
        self._kept += count
        if self._trim is not None and self._kept >= self._STEP:
            self._trim(0)
            self._kept = 0


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. BackendError for a device that PyTorch does not know."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"unknown device {str(device)!r}; choose auto, cpu, cuda or cuda:N") from error


def processor(device: torch.device) -> str:
    """What computes: the name of the GPU, or the instructions that PyTorch uses on this CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def run(
    plan: Plan,
    out: Path,
    *,
    device: str | torch.device = "auto",
    backend: str = "auto",
    overwrite: bool = False,
    progress: ProgressSink | None = None,
) -> MergeReport:
    """Carry out a plan.

    Args:
        plan: from `build_plan`.
        out: output directory; new, empty, or holding this very merge (unfinished: it goes on; finished: it is
            verified).
        device, backend: where and with what to compute.
        overwrite: replace another merge that is there.
        progress: told about bytes and tensors; default: nobody.

    Raises:
        OutputError, CheckpointError, BackendError: as their names say.
        NonFiniteError: an input holds NaN or infinity (and the config does not allow it), or a result overflows.
    """
    clock = _Clock()
    progress = progress or NoProgress()
    target = resolve_device(device)
    run_op = Dispatcher(backend, target)
    _log_plan(plan, backend, target)
    _refuse_inputs(plan, out)
    identity = plan.identity(backend, str(target), processor(target))
    manifest = read_manifest(out)
    if manifest is not None and manifest["identity"] == identity and not overwrite:
        return _verified(plan, out, clock, progress)
    if target.type == "cuda":
        torch.cuda.reset_peak_memory_stats(target)
    with (
        OutputDirectory(out, plan.layouts, identity=identity, overwrite=overwrite) as output,
        Reader(plan.inputs.stamps) as reader,
    ):
        resumed = len(output.finished)
        if resumed:
            kept = sorted(output.finished)
            event("resumed", f"kept {resumed} finished shards of an interrupted run", shards=kept)
        steps = [step for step in plan.steps if step.file not in output.finished]
        read = sum(step.bytes_read for step in steps)
        written = sum(step.nbytes for step in steps)
        progress.start(read + written)
        try:
            _merge(steps, plan.config.allow_nonfinite, run_op, reader, output, clock, progress)
        finally:
            progress.close()
        _publish(plan, output, backend, target)
    report = MergeReport(
        output=out,
        tensors=len(plan.steps),
        parameters=plan.parameters,
        bytes_read=read,
        bytes_written=written,
        seconds=clock.elapsed,
        reading=clock.reading,
        computing=clock.computing,
        writing=clock.writing,
        peak_memory=peak_resident_bytes(),
        peak_device_memory=torch.cuda.max_memory_allocated(target) if target.type == "cuda" else 0,
        backends={op: choice.backend for op, choice in run_op.choices.items()},
        warnings=plan.warnings,
        resumed_shards=resumed,
    )
    event("finished", report.lines()[0], **asdict(report))
    return report


def _log_plan(plan: Plan, backend: str, device: torch.device) -> None:
    text = f"{plan.method.name}: {len(plan.steps)} tensors, {plan.bytes_read} bytes to read"
    event("plan", text, **plan.summary(), backend=backend, device=str(device))
    for warning in plan.warnings:
        event("warning", warning, level=WARNING)


def _refuse_inputs(plan: Plan, out: Path) -> None:
    """An output that is an input would, with overwrite, be removed before it is read."""
    for checkpoint in plan.inputs.all:
        folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        parents = {parent for file in checkpoint.files for parent in file.resolve().parents}
        if out.resolve() in {folder.resolve(), *parents}:
            raise OutputError(f"{out} holds the input {checkpoint.path}; give another directory")


def peak_resident_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _merge(
    steps: list[Step],
    allow_nonfinite: bool,
    run_op: Dispatcher,
    reader: Reader,
    output: OutputDirectory,
    clock: _Clock,
    progress: ProgressSink,
) -> None:
    """The pipeline. Memory is bounded by the pieces in flight: READ_AHEAD + 1 + WRITE_BEHIND."""
    heap = _Heap()
    readers = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="pymerge-read")
    writer = ThreadPoolExecutor(1, thread_name_prefix="pymerge-write")
    writes: deque[Future[None]] = deque()

    def write(step: Step, merged: Tensor) -> None:
        output.write(step.name, merged)
        progress.advance(merged.nbytes)

    try:
        for step, piece, loaded in _read_ahead(steps, reader, readers):
            progress.tensor(step.name)
            mark = time.perf_counter()
            if piece is step.pieces[0]:
                began = mark
                event("step_started", step.name, level=DEBUG, tensor=step.name, action=step.action.label)
            tensors = [future.result() for future in loaded]
            progress.advance(sum(tensor.nbytes for tensor in tensors))
            read = time.perf_counter()
            merged = _compute(step, piece, tensors, run_op, allow_nonfinite)
            del tensors, loaded
            computed = time.perf_counter()
            while len(writes) >= WRITE_BEHIND:
                writes.popleft().result()
            writes.append(writer.submit(write, step, merged))
            del merged
            heap.freed(step.peak_bytes(piece))
            if piece is step.pieces[-1]:
                size = {"bytes_read": step.bytes_read, "bytes_written": step.nbytes}
                event("step_finished", step.name, level=DEBUG, tensor=step.name, seconds=computed - began, **size)
            clock.reading += read - mark
            clock.computing += computed - read
            clock.writing += time.perf_counter() - computed
        mark = time.perf_counter()
        while writes:
            writes.popleft().result()
        clock.writing += time.perf_counter() - mark
    finally:
        readers.shutdown(cancel_futures=True)
        writer.shutdown(cancel_futures=True)


def _read_ahead(
    steps: list[Step], reader: Reader, readers: ThreadPoolExecutor
) -> Iterator[tuple[Step, Piece, list[Future[Tensor]]]]:
    """Pieces in the order of the plan, with the reads of the next ones already under way."""
    ahead: deque[tuple[Step, Piece, list[Future[Tensor]]]] = deque()
    for step in steps:
        for piece in step.pieces:
            reads = [readers.submit(_read, reader, entry, piece) for entry in step.inputs]
            ahead.append((step, piece, reads))
            if len(ahead) > READ_AHEAD:
                yield ahead.popleft()
    while ahead:
        yield ahead.popleft()


def _read(reader: Reader, entry: TensorEntry, piece: Piece) -> Tensor:
    return reader.read(entry, piece.start, piece.stop) if entry.shape else reader.read(entry)


def _compute(step: Step, piece: Piece, tensors: list[Tensor], run_op: Dispatcher, allow_nonfinite: bool) -> Tensor:
    """The merged piece, on the CPU, in the output's dtype."""
    if not allow_nonfinite:
        for entry, tensor in zip(step.inputs, tensors, strict=True):
            check_finite(entry, piece.start, tensor)
    moved = [tensor.to(run_op.device) for tensor in tensors]
    base, experts = (moved[0], moved[1:]) if step.reads_base else (moved[0], moved)
    try:
        merged = pieces.run(step.action, step.layer, run_op, base, experts, TORCH_DTYPES[step.dtype])
    except ArgumentError as error:
        raise ArgumentError(f"{step.name}: {error}") from error
    if not allow_nonfinite and not is_finite(merged):
        raise NonFiniteError(
            f"{step.name}: the merged tensor has values that {merged.dtype} cannot hold; "
            "choose out_dtype bfloat16 or float32, or smaller weights"
        )
    return merged.cpu()


def _publish(plan: Plan, output: OutputDirectory, backend: str, device: torch.device) -> None:
    """Put everything beside the weights in place, and make the output visible."""
    donor = plan.inputs.donor
    files: dict[str, bytes | Path] = {path.as_posix(): donor.path / path for path in donor.other_files}
    if plan.config_json is not None:
        files["config.json"] = plan.config_json
    files["README.md"] = model_card(plan)
    files[RECIPE_NAME] = plan.config.source_text.encode()
    manifest = build_manifest(
        plan.layouts,
        output.checksums,
        files,
        identity=output.identity,
        recipe={
            "config": RECIPE_NAME,
            "directory": printable(plan.config.directory or Path.cwd()),
            "dtype": plan.dtype,
            "backend": backend,
            "device": str(device),
        },
        base_parameters=plan.base_parameters,
    )
    output.publish(files, manifest)


def _verified(plan: Plan, out: Path, clock: _Clock, progress: ProgressSink) -> MergeReport:
    """The report of an output that was there already, after reading it again."""
    progress.start(sum(step.nbytes for step in plan.steps))

    def advance(count: int, name: str) -> None:
        progress.tensor(name)
        progress.advance(count)

    try:
        found = verify(out, progress=advance, allow_nonfinite=plan.config.allow_nonfinite)
    finally:
        progress.close()
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
        seconds=clock.elapsed,
        reading=clock.elapsed,
        computing=0.0,
        writing=0.0,
        peak_memory=peak_resident_bytes(),
        peak_device_memory=0,
        warnings=plan.warnings,
        already_done=True,
    )
    event("already_done", report.lines()[0], **asdict(report))
    return report
