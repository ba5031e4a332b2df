"""Runs all steps on a machine with an NVIDIA GPU: `make gpu`.

    python -m benchmarks device [--dry-run] [--out FOLDER]

Needs PyTorch there and, in .gpu, the wheels that `make gpu-bundle` has brought; no network, no environment. A step that
fails or takes too long stops none; what it has measured by then is kept. FOLDER (default: $OUT, or
benchmarks/runs/device) gets summary.txt, log.txt, device.json, ops.json and the tests' reports: bring them home, then

    python -m benchmarks device take FOLDER
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.device import install
from benchmarks.device.steps import MOST_SECONDS, STEPS, Place, Step
from benchmarks.harness import commands

ROOT = Path(__file__).resolve().parents[2]
# Without pymerge: the installed one is meant, whose extensions the source tree would hide.
COPIED = ("benchmarks", "csrc", "examples", "tests", "pyproject.toml", "setup.py")
# Options of a file system in memory: with huge pages where the kernel has them for it.
IN_MEMORY = ("size=100g,huge=always", "size=100g")
_LOG_TAIL = 300_000  # characters of a step's output that go home


def main(arguments: Sequence[str]) -> None:
    """Run, or print, the steps."""
    parser = commands.parser("benchmarks.device.run", __doc__)
    parser.add_argument("--dry-run", action="store_true", help="print the steps and their limits, and do nothing")
    parser.add_argument("--out", type=Path, default=None, metavar="FOLDER")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.dry_run:
        for step in STEPS:
            print(f"{step.name:8} {step.seconds:3d} s  {step.what}")
        return
    if options.device == "cuda" and not cuda_devices():
        raise SystemExit("no CUDA device here: its driver finds none; run this on a machine with an NVIDIA GPU")
    out = options.out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "runs" / "device")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, in_memory() as data:
        run = Run(Place(options.device, options.tiny, out.resolve(), data), Path(folder))
        run.all()
    if run.failed:
        raise SystemExit(f"failed: {', '.join(run.failed)}; see {out / 'log.txt'}")


def cuda_devices() -> int:
    """Number of devices that NVIDIA's driver finds; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


class Run:
    """The steps in their order, in what is left of the time of all."""

    def __init__(self, place: Place, work: Path) -> None:
        self.place, self.work = place, work
        self.failed: list[str] = []
        self._began = time.monotonic()
        self._summary, self._log = (place.out / name for name in ("summary.txt", "log.txt"))
        for file in (self._summary, self._log):
            file.write_text("")
        commit = ROOT / ".gpu" / "commit"
        paths = [work / "checkout", work / "site"] if install.bundled(ROOT) else [work / "checkout", ROOT]
        self._environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYMERGE_TEST_DEVICE": place.device,
            "PYMERGE_COMMIT": commit.read_text().strip() if commit.exists() else "",
            "TRITON_CACHE_DIR": str(work / "triton"),
        }

    def all(self) -> None:
        """Carry out all steps."""
        checkout = self.work / "checkout"
        checkout.mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, checkout / name, ignore=shutil.ignore_patterns("runs", "__pycache__", "*.so"))
            else:
                shutil.copy(source, checkout)
        for step in STEPS:
            self._carry_out(step)
        for file in (checkout / "benchmarks" / "runs").glob("*/*-ops.json"):
            shutil.copy(file, self.place.out / "ops.json")

    def _carry_out(self, step: Step) -> None:
        left = MOST_SECONDS - (time.monotonic() - self._began)
        limit = min(step.seconds, left)
        if limit < 3:
            self._tell(f"== {step.name}: left out, no time is left")
            self.failed.append(step.name)
            return
        began = time.monotonic()
        if step.name == "install":
            ended, output = install.install(ROOT, self.work / "site", limit)
        else:
            ended, output = limited(step.command(self.place), limit, self.work / "checkout", self._environment)
        with self._log.open("a") as log:
            log.write(f"== {step.name}\n{output[-_LOG_TAIL:]}\n")
        self._tell(f"== {step.name}: {ended or 'done'}, {time.monotonic() - began:.0f} s")
        for line in output.splitlines()[-6:]:
            self._tell(f"   {line[:200]}")
        if ended:
            self.failed.append(step.name)

    def _tell(self, line: str) -> None:
        print(line, flush=True)
        with self._summary.open("a") as summary:
            summary.write(line + "\n")


def limited(command: Sequence[str], seconds: float, cwd: Path, environment: dict[str, str]) -> tuple[str, str]:
    """Run a command, ended after so many seconds; returns how it failed ("" if it did not) and what it printed."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        try:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=cwd, env=environment, start_new_session=True
            )
        except OSError as error:
            return f"not started ({error})", ""
        try:
            code = process.wait(seconds)
            ended = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its own group: this one and what it has started
            process.wait()
            ended = f"ended after {seconds:.0f} s"
        file.seek(0)
        return ended, file.read()


@contextmanager
def in_memory() -> Iterator[Path]:
    """A folder in memory for models: a file system of its own where this process may mount one, else in /dev/shm."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        own = Path(folder, "models")
        own.mkdir()
        mounted = os.geteuid() == 0 and cuda_devices() > 0 and any(map(partial(_mount, own), IN_MEMORY))
        try:
            yield own
        finally:
            if mounted:
                subprocess.run(["umount", "--lazy", str(own)], check=False)


def _mount(folder: Path, options: str) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0
