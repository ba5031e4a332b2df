"""Report of a merge: counts, times and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pymerge.common.units import count_of, format_bytes
from pymerge.engine.trace import StepTime


@dataclass(frozen=True)
class MergeReport:
    """Result of `pymerge.merge`. Times in seconds of wall clock, sizes in bytes."""

    output: Path
    tensors: int
    parameters: int
    bytes_read: int
    bytes_written: int
    seconds: float
    reading: float  # waiting for inputs
    computing: float
    writing: float  # waiting for the writer
    budget: int  # for tensors, on the device
    peak_memory: int  # resident set of the whole process at its largest
    peak_device_memory: int  # allocated on the CUDA device at most; 0 on a CPU
    backends: Mapping[str, str] = field(default_factory=dict)  # op -> backend
    warnings: tuple[str, ...] = ()
    resumed_shards: int = 0  # shards kept from an earlier, interrupted run
    overlap: float = 0.0  # of the time in which files were read or written, the share with a computation under way
    slowest: tuple[StepTime, ...] = ()  # the tensors that took longest
    already_done: bool = False  # the output was there, whole, and has been verified instead, unless it was a part's run
    part: tuple[int, int] | None = None  # of a run that has merged a part: its number, and of how many
    files: int = 0  # of a part: its output files; of a run that has published what parts made: all
    missing_files: int = 0  # of a part: files of the whole output that nobody has made yet

    @property
    def rate(self) -> float:
        """Bytes read and written in a second."""
        return (self.bytes_read + self.bytes_written) / self.seconds if self.seconds > 0 else 0.0

    def lines(self) -> list[str]:
        """The summary, for people."""
        if self.part is not None and self.already_done and not self.files:
            return [f"{self.output} holds this very merge already, whole"]
        if self.files and self.part is None and not self.bytes_written:
            return [
                f"published {count_of(self.files, 'file')} ({self.tensors} tensors, {self.parameters:,} parameters) in "
                f"{self.output}, in {self.seconds:.1f} s"
            ]
        if self.already_done:
            return [
                f"{self.output} holds this very merge already; verified {self.tensors} tensors "
                f"({format_bytes(self.bytes_read)}) in {self.seconds:.1f} s"
            ]
        total = max(self.seconds, 1e-9)
        shares = (
            f"reading {self.reading / total:.0%}, computing {self.computing / total:.0%}, "
            f"writing {self.writing / total:.0%}"
        )
        memory = f"peak memory {format_bytes(self.peak_memory)}"
        if self.peak_device_memory:
            memory += f", on the device {format_bytes(self.peak_device_memory)}"
        part = f"part {self.part[0]}/{self.part[1]}: " if self.part else ""
        lines = [
            f"{part}merged {self.tensors} tensors ({self.parameters:,} parameters) into {self.output}",
            f"{self.seconds:.1f} s: {shares}; {self.overlap:.0%} of the file access ran beside computing",
            f"read {format_bytes(self.bytes_read)}, wrote {format_bytes(self.bytes_written)}, "
            f"{self.rate / 1e9:.2f} GB/s; {memory}",
        ]
        if self.backends:
            lines.append("ops: " + ", ".join(f"{op} {name}" for op, name in sorted(self.backends.items())))
        if self.resumed_shards:
            lines.append(f"kept {self.resumed_shards} finished shards of an interrupted run")
        if self.part:
            lines.append(self._rest())
        return lines

    def _rest(self) -> str:
        """Line on what is still to do when a part is done."""
        if self.already_done:
            return "all files were there; another part has made a model of them"
        if self.missing_files:
            missing = count_of(self.missing_files, "file")
            return f"{missing} of other parts still to come; when all are there: pymerge finalize"
        return "all files are there; they become a model by pymerge finalize"

    def slowest_lines(self) -> list[str]:
        """A table of the slowest tensors, for people."""
        if not self.slowest:
            return []
        rows = [f"{step.reading:9.3f} {step.computing:9.3f} {step.writing:9.3f}  {step.name}" for step in self.slowest]
        return ["slowest tensors, seconds:", "     read   compute     write  tensor", *rows]
