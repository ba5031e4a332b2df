"""A merge by several processes of this machine, each on a device: the files are shared out, then published."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pymerge import env
from pymerge.common.events import event, logger
from pymerge.common.progress import NoProgress, ProgressSink
from pymerge.engine.assignment import Assignment, combined, pack
from pymerge.engine.child import put, take
from pymerge.engine.parts import conclude, nothing_done
from pymerge.engine.publishing import verified
from pymerge.engine.report import MergeReport
from pymerge.engine.run import begin, whole_directory
from pymerge.errors import PymergeError
from pymerge.output.manifest import read_manifest
from pymerge.planner.parts import assign
from pymerge.planner.plan import Plan

_PATIENCE = 20.0  # seconds that a process has to end cleanly


def run_on(
    plan: Plan,
    out: Path,
    devices: Sequence[str],
    *,
    memory: int,
    overwrite: bool = False,
    progress: ProgressSink | None = None,
) -> MergeReport:
    """Carry out a plan with a process on each of these devices; the bytes are those of one process.

    Args:
        plan: for the first of the devices, which are all of its kind.
        out: as `pymerge.engine.run.run` takes it.
        devices: names; one that is there twice has two processes.
        memory: bytes of each process for tensors, on the host.
        overwrite: replace another merge that is there.
        progress: told about bytes and tensors of all processes.

    Raises:
        PymergeError: what the first process to fail raised; the others are ended, and what is whole is kept.
    """
    started = time.perf_counter()
    progress = progress or NoProgress()
    identity = begin(plan, out)
    manifest = read_manifest(out)
    if manifest is not None and manifest["identity"] == identity and not overwrite:
        return verified(plan, out, started, progress)
    with whole_directory(plan, out, identity, overwrite=overwrite) as output:
        kept = len(output.finished)
        shares = assign(plan, len(devices), output.missing)
        output.share()
        packed = pack(plan)
        assignments = [
            Assignment(packed, out, tuple(files), device, memory)
            for files, device in zip(shares, devices, strict=True)
            if files
        ]
        reports = _Processes(assignments, progress).run()
        output.reclaim(verify=False)
        conclude(plan, output)
    whole = replace(nothing_done(plan, out, started), resumed_shards=kept)
    report = combined(reports, whole)
    event("finished", report.lines()[0], **asdict(report))
    return report


class _Processes:
    """Processes at their assignments. The thread that calls `run` hears of them all."""

    def __init__(self, assignments: Sequence[Assignment], progress: ProgressSink) -> None:
        self._assignments = assignments
        self._progress = progress
        self._heard: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._running: list[subprocess.Popen[bytes]] = []
        self._total = 0

    def run(self) -> list[MergeReport]:
        """Start them all and wait for their reports."""
        reports: dict[int, MergeReport] = {}
        try:
            for number, assignment in enumerate(self._assignments):
                self._start(number, assignment)
            while len(reports) < len(self._assignments):
                number, message = self._heard.get()
                if message is None:
                    if number not in reports:
                        raise self._vanished(number)
                elif message[0] == "done":
                    reports[number] = message[1]
                else:
                    self._hear(number, *message)
        finally:
            self._end(quickly=len(reports) < len(self._assignments))
            self._progress.close()
        return list(reports.values())

    def _start(self, number: int, assignment: Assignment) -> None:
        threads = max(1, env.threads() // len(self._assignments))
        child = subprocess.Popen(
            [sys.executable, "-m", "pymerge.engine.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self._running.append(child)
        assert child.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: said when its messages end
            put(child.stdin, (assignment, logger.getEffectiveLevel()))
        threading.Thread(target=self._listen, args=(number, child), daemon=True).start()

    def _listen(self, number: int, child: subprocess.Popen[bytes]) -> None:
        assert child.stdout is not None
        while True:
            message = take(child.stdout.fileno())
            self._heard.put((number, message))
            if message is None:
                return

    def _hear(self, number: int, kind: str, *said: Any) -> None:
        if kind == "error":
            raise said[0]
        if kind == "total":
            self._total += said[0]
            self._progress.start(self._total)
        elif kind == "progress":
            count, name = said
            self._progress.tensor(name)
            self._progress.advance(count)
        else:
            name, text, level, fields = said
            event(name, text, level=level, **{**fields, "process": number + 1})

    def _vanished(self, number: int) -> PymergeError:
        code = self._running[number].wait()
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        maybe = ", maybe because memory ran out: give a lower --memory" if code == -signal.SIGKILL else ""
        return PymergeError(
            f"the process on {self._assignments[number].device} was ended {how}{maybe}; the same command goes on where "
            "this one stopped"
        )

    def _end(self, *, quickly: bool) -> None:
        """Wait for all, or have those that still run end now, cleanly if they do not take too long."""
        for child in self._running if quickly else ():
            with suppress(OSError):
                child.terminate()
        deadline = time.monotonic() + _PATIENCE
        for child in self._running:
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            assert child.stdin is not None
            with suppress(OSError):
                child.stdin.close()
